"""What `test_tuners.py` asks warm ranks to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from pipeline import engine
from pipeline.engine import gather_state
from tests.support.tuners import config, disturb, padded

ROWS = [[7, 12, 33, 41], [5, 90, 6, 8], [64, 11, 23, 52], [31, 4, 9, 27]]


def train(base: str, method: str, shape: str, stage: int) -> dict[str, list[float]]:
    """Three SGD steps on this rank's share of four rows, from a sharded base under ZeRO-3; the adapter then, by name."""
    from peft import get_peft_model

    engine.start(0)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": len(ROWS) // world,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    watched = (
        HfDeepSpeedConfig(settings) if stage == 3 else None
    )  # alive while the model loads: its weights are sharded
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert all(hasattr(p, "ds_id") for p in plain.parameters()) == (stage == 3)
    torch.manual_seed(1)
    model = get_peft_model(plain, config(method, shape), adapter_name="policy", autocast_adapter_dtype=False)
    disturb(model, "policy")
    trained = [p for p in model.parameters() if p.requires_grad]
    run, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=settings)
    share = ROWS[rank * len(ROWS) // world : (rank + 1) * len(ROWS) // world]
    for _ in range(3):
        batch = padded(share, "right")
        run.backward(run(**batch, labels=batch["input_ids"]).loss)
        run.step()
    if watched is not None:
        hf_deepspeed.unset_hf_deepspeed_config()
    state = gather_state((name, p) for name, p in model.named_parameters() if ".policy." in name)
    run.destroy()
    return {name: value.double().flatten().tolist() for name, value in state.items()}
