"""What `test_methods.py` asks warm ranks to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from pipeline import engine
from pipeline.adapters import build
from pipeline.config.schema import Base
from pipeline.engine import gather_state
from pipeline.model import load
from tests.support.methods import adapter

ROWS = [[7, 12, 33, 41], [5, 90, 6, 8], [64, 11, 23, 52], [31, 4, 9, 27]]


def train(base: str, methods: list[str], stage: int, target: str, packed: bool = False) -> None:
    """For each method, three SGD steps on this rank's share of four rows, from a base that is sharded while it loads under
    ZeRO-3, or `packed` in 4 bits. Rank 0 writes the adapters as they are then to `target`."""
    engine.start(0)
    found = {method: _train(base, method, stage, packed) for method in methods}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, target)


def _train(base: str, method: str, stage: int, packed: bool) -> dict[str, Tensor]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": len(ROWS) // world,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if packed:
        settings["bf16"] = {"enabled": True}
    sharding = HfDeepSpeedConfig(settings) if stage == 3 else None  # while it lives, weights are sharded as they load
    tok = load.tokenizer(base)
    held = Base(model=base, dtype="bf16", quantization="nf4") if packed else Base(model=base, dtype="fp32")
    plain = load.causal(held, tok, sharded=stage == 3)
    assert packed or all(hasattr(p, "ds_id") for p in plain.parameters()) == (stage == 3)
    torch.manual_seed(1)
    model = build.attach(plain, adapter(method), "CAUSAL_LM", name="policy", steps=3).train()
    trained = build.trained(model, "policy")
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    run, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.05), config=settings)
    ids = torch.tensor(ROWS[rank * len(ROWS) // world : (rank + 1) * len(ROWS) // world])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for _ in range(3):
        mask = torch.ones_like(ids)
        run.backward(run(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids).loss)
        run.step()
    if sharding is not None:
        hf_deepspeed.unset_hf_deepspeed_config()
    state = gather_state((n, p) for n, p in model.named_parameters() if build.belongs(n, "policy"))
    run.destroy()
    return state
