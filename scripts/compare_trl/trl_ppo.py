"""One PPO run of TRL 1.12, with an adapter written at every snapshot step.

python trl_ppo.py SETTINGS.json SEED FOLDER     # with the folder that holds TRL 1.12 first on PYTHONPATH
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Ids(nn.Module):
    """A backbone whose last hidden state is the token ids, -1 where TRL masks padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> Any:
        return SimpleNamespace(hidden_states=(torch.where(attention_mask.bool(), input_ids, -1),))


class RuleReward(nn.Module):
    """TRL takes a reward model and no reward function: this is one whose score is a function of the decoded response.

    TRL reads the score at the response's last token; here every column holds it. `context` is the width to which every
    prompt is padded, so that the response begins there.
    """

    base_model_prefix = "backbone"

    def __init__(self, function: Any, tokenizer: Any, context: int) -> None:
        super().__init__()
        self.backbone, self.function, self.tokenizer, self.context = Ids(), function, tokenizer, context

    def score(self, ids: Tensor) -> Tensor:
        prompts = [self._text(row[: self.context]) for row in ids]
        responses = [self._text(row[self.context :]) for row in ids]
        scores = torch.tensor(self.function(prompts, responses, [{} for _ in responses]), device=ids.device)
        return scores.view(-1, 1, 1).expand(*ids.shape, 1)

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids[ids >= 0].tolist(), skip_special_tokens=True))


class Recorder(TrainerCallback):
    """Writes the policy's adapter at the snapshot steps (and before the first), and TRL's own metrics line by line."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps
        self.policy: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.policy.save_pretrained(self.folder / "step-0")

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step in self.steps:
            self.policy.save_pretrained(self.folder / f"step-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **unused: Any) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def main(settings: dict[str, Any], seed: int, folder: Path) -> None:
    """Train as `settings` say; leaves step-N folders, metrics.jsonl and, when complete, done.json."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(settings["base"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32)
    module, _, name = settings["reward"].partition(":")
    reward = RuleReward(getattr(import_module(module), name), tokenizer, settings["prompt_tokens"])
    prompts = [json.loads(line)["prompt"] for line in Path(settings["train"]).read_text(encoding="utf-8").splitlines()]
    rows = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    recorder = Recorder(folder, settings["snapshots"])
    trainer = PPOTrainer(
        args=config(settings, seed, folder),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # the policy with its adapter off
        reward_model=reward,
        value_model=value_model(settings),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=settings["prompt_tokens"]),
        peft_config=lora(settings, "CAUSAL_LM"),
        callbacks=[recorder],
    )
    recorder.policy = trainer.policy_model
    gc.freeze()  # TRL collects garbage twice a step; without the libraries' objects that is a fifth of its time less
    began = time.monotonic()
    trainer.train()
    facts = {"trl": trl.__version__, "training_seconds": time.monotonic() - began}
    (folder / "done.json").write_text(json.dumps(facts), encoding="utf-8")


def config(settings: dict[str, Any], seed: int, folder: Path) -> PPOConfig:
    """One step of the optimizer per minibatch, in micro-batches of `micro_batch` rows (all of them unless given)."""
    batch, micro = settings["batch"], settings.get("micro_batch", settings["batch"])
    return PPOConfig(
        output_dir=str(folder / "trainer"),
        seed=seed,
        total_episodes=batch * settings["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        local_rollout_forward_batch_size=settings.get("rollout", batch),
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=settings["epochs"],
        response_length=settings["response_tokens"],
        temperature=settings["temperature"],
        stop_token="eos",
        learning_rate=settings["lr"],
        lr_scheduler_type=settings["lr_schedule"],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        weight_decay=0.0,
        optim="adamw_torch",
        kl_coef=settings["kl_coef"],
        kl_estimator="k1",
        cliprange=settings["clip"],
        cliprange_value=settings["value_clip"],
        vf_coef=settings["vf_coef"],
        gamma=settings["gamma"],
        lam=settings["lam"],
        whiten_rewards=False,
        bf16=settings.get("dtype") == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )


def lora(settings: dict[str, Any], task: str | None) -> LoraConfig:
    """The adapter of policy and critic: every linear layer but the output head, by name."""
    return LoraConfig(r=settings["r"], lora_alpha=settings["alpha"], target_modules=settings["targets"], task_type=task)


def value_model(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A critic from the base with an adapter and a fresh head of Relay's size; base weights frozen, as Relay's are."""
    model = AutoModelForSequenceClassification.from_pretrained(settings["base"], num_labels=1, dtype=dtype)
    model = inject_adapter_in_model(lora(settings, None), model)
    nn.init.normal_(model.score.weight, std=1.0 / math.sqrt(model.config.hidden_size + 1))
    model.score.requires_grad_(True)
    return model


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2]), Path(sys.argv[3]))
