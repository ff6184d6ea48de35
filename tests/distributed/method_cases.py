"""What `test_methods.py` asks warm ranks to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from pipeline import engine
from pipeline.adapters import build
from pipeline.adapters.adalora import Allocation
from pipeline.config.schema import Base
from pipeline.engine import gather_state
from pipeline.model import load
from pipeline.model.roles import Roles
from tests.distributed import cases
from tests.support.methods import adapter

FUNCTION = "tests.distributed.method_cases:vowels"
ROWS = [[7, 12, 33, 41], [5, 90, 6, 8], [64, 11, 23, 52], [31, 4, 9, 27]]


def train(base: str, methods: list[str], stage: int, target: str, packed: bool = False, steps: int = 3) -> None:
    """For each method, `steps` SGD steps on this rank's share of four rows, from a base that is sharded while it loads under
    ZeRO-3, or `packed` in 4 bits. Rank 0 writes the adapters as they are then to `target`."""
    engine.start(0)
    found = {method: _train(base, method, stage, packed, steps) for method in methods}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, target)


def _train(base: str, method: str, stage: int, packed: bool, steps: int) -> dict[str, Tensor]:
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
    allocation = Allocation(model, "policy") if method == "adalora" else None
    trained = build.trained(model, "policy")
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    run, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.05), config=settings)
    if allocation is not None:
        allocation.follow(run, lambda: run.global_steps)
    ids = torch.tensor(ROWS[rank * len(ROWS) // world : (rank + 1) * len(ROWS) // world])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for _ in range(steps):
        mask = torch.ones_like(ids)
        run.backward(run(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids).loss)
        run.step()
    if sharding is not None:
        hf_deepspeed.unset_hf_deepspeed_config()
    state = gather_state((n, p) for n, p in model.named_parameters() if build.belongs(n, "policy"))
    run.destroy()
    return state


def vowels(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    """A reward: the share of a response's characters that are vowels."""
    return [sum(letter in "aeiou" for letter in response) / max(1, len(response)) for response in responses]


def ppo_updates(recipes: dict[str, str], folder: str, target: str) -> dict[str, dict[str, Any]]:
    """The first rollout and update of PPO for the recipe of each method, its policy and critic moved away from their start:
    statistics, names of trained tensors that stayed and of others that did not, how many models there are. Rank 0 writes
    what the losses are made of to `target`."""
    made, found = {}, {}
    for method, recipe in recipes.items():
        made[method], found[method] = _ppo_update(recipe, f"{folder}/{method}")
    torch.save(made, target)
    return found


def _ppo_update(recipe: str, run_dir: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import stages.ppo.__main__ as program

    original = program.assemble
    try:
        program.assemble = lambda *args, **kwargs: _moved(original(*args, **kwargs))
        loop, batch = cases._collected(recipe, run_dir, [])
    finally:
        program.assemble = original
    roles = loop.engine.module
    before = {name: value.detach().clone() for name, value in _tensors(roles)}
    stats = loop.update(batch, 0, loop.kl.coef)
    moved = {name for name, value in _tensors(roles) if not torch.equal(value, before[name])}
    trained = {name for role in ("policy", "critic") for name, _ in roles.named_trainable(role)}
    made = {name: getattr(batch, name) for name in ("advantages", "mask", "values", "returns")}
    return made, {
        "stats": stats,
        "stayed": sorted(trained - moved),
        "moved": sorted(moved - trained),
        "frozen": len(before) - len(trained),
        "trunks": len(roles.trunks),
    }


def _tensors(roles: Roles) -> Iterator[tuple[str, Tensor]]:
    yield from roles.named_parameters()
    yield from roles.named_buffers()


def _moved(roles: Roles) -> Roles:
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for role in ("policy", "critic"):
            for parameter in roles.trainable(role):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype))
    return roles
