"""What warm ranks are asked to do for `test_adalora.py`. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from tests.adapters import reference
from tests.distributed.cases import _collected, _weights
from tests.support.stages import barrier


def trained(
    zero: str,
    target: str,
    dtype: str = "fp32",
    max_grad_norm: float = 0.0,
    accumulate: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train `reference`'s model on these ranks, two micro-batches a step; rank 0 saves weights and masters to `target`.
    `accumulate` is the dtype in which DeepSpeed accumulates gradients, and `changes` are laid over its ZeRO settings."""
    import deepspeed

    from pipeline import engine
    from pipeline.adapters.adalora import Allocation
    from pipeline.config.recipe import DS_CONFIGS
    from pipeline.model.load import DTYPES

    engine.start(0)
    peft = reference.model(reference.settings(), dtype=DTYPES[dtype])
    allocation = Allocation(peft)
    config = json.loads((DS_CONFIGS / f"{zero}.json").read_text())
    config["zero_optimization"] = {**config.get("zero_optimization", {}), **changes}
    config = engine.overlay(config, dtype=dtype, micro_batch=2, accumulation=2, max_grad_norm=max_grad_norm)
    if accumulate:
        config["data_types"] = {"grad_accum_dtype": accumulate}
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=reference.RATE)
    started = engine.initialize(peft, optimizer, config)
    allocation.follow(started, lambda: started.global_steps)
    for step in range(reference.STEPS):
        mine = reference.rows(step).chunk(dist.get_world_size())[dist.get_rank()].to(started.device)
        for part in mine.chunk(2):
            logits = started(input_ids=part).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 97), part[:, 1:].reshape(-1))
            started.backward(loss)
            started.step()
    named = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    masters = {n: m.clone() for n, m in engine.masters(started, named)}
    found = {}
    for name, parameter in named.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().float().cpu().clone()
    if dist.get_rank() == 0:
        torch.save({"weights": found, "masters": masters, "pattern": allocation.pattern}, target)
    barrier()
    return allocation.metrics()


def one_update(recipe: str, run_dir: str, overrides: list[str], target: str) -> dict[str, Any]:
    """The statistics of one PPO update; rank 0 saves the weights before and after it to `target`."""
    loop, batch = _collected(recipe, run_dir, overrides)
    before = _weights(loop)
    stats = loop.update(batch, 0, loop.kl.coef)
    after = _weights(loop)
    if dist.get_rank() == 0:
        torch.save({"before": before, "after": after}, target)
    barrier()
    return stats
