"""TRL 1.12's side of a benchmark: its PPOTrainer with LoRA, one step per turn.

python trl_side.py SETTINGS.json     # with the folder that holds TRL 1.12, and scripts/compare_trl, first on PYTHONPATH
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import shapes
import torch
import turns
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, TrainerCallback, set_seed
from trl.experimental.ppo import PPOTrainer
from trl_ppo import RuleReward, config, lora, value_model


class Turns(TrainerCallback):
    """Ends a turn after each step, and waits for the next."""

    def __init__(self) -> None:
        self.turns = turns.told()

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.done = next(self.turns)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.done()
        self.done = next(self.turns)


def main(settings: dict[str, Any]) -> None:
    set_seed(0)
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(settings["base"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype)
    reward = RuleReward(shapes.rule, tokenizer, settings["prompt_tokens"])
    lines = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()
    rows = Dataset.from_dict({"input_ids": [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]})
    trainer = PPOTrainer(
        args=config(settings, 0, Path(settings["work"])),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # the policy with its adapter off
        reward_model=reward,
        value_model=value_model(settings, dtype),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        data_collator=DataCollatorWithPadding(tokenizer),
        peft_config=lora(settings, "CAUSAL_LM"),
        callbacks=[Turns()],
    )
    assert trainer.accelerator.device.type == device
    gc.freeze()  # TRL collects garbage twice a step; without the libraries' objects that is a fifth of its time less
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
