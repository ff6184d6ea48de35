"""Every method with options small enough for tiny models, as recipes have it."""

from __future__ import annotations

from typing import Any

from pipeline.config.fitting import CONV1D
from pipeline.config.methods import METHODS
from pipeline.config.schema import Adapter

FAMILIES = ("llama", "qwen2", "opt", "gpt2")


def fits(method: str, family: str) -> bool:
    """Whether a family's layers can have the method's adapter."""
    return METHODS[method].conv1d or family not in CONV1D


CASES = [
    (method, family)
    for method in METHODS
    for family in FAMILIES
    if method not in ("full", "qlora") and fits(method, family)
]
"""Every adapter on whole weights x every family."""

SMALL: dict[str, Any] = {
    "num_virtual_tokens": 3,
    "encoder_hidden_size": 8,
    "bottleneck_dim": 8,
    "r": 4,
    "alpha": 8.0,
    "init_r": 4,
    "target_r": 2,
    "oft_block_size": 8,
}


def options(method: str) -> dict[str, Any]:
    """The recipe's adapter block."""
    return {"method": method, **{key: value for key, value in SMALL.items() if key in METHODS[method].options}}


def adapter(method: str) -> Adapter:
    return Adapter(**options(method))


def changes(method: str, zero: int) -> dict[str, Any]:
    """What a recipe of `tests.support.tiny` needs for the method: fewer steps, a base that it can train, and LoRA in PPO
    where the method cannot be there."""
    found: dict[str, Any] = {"adapter": options(method), "deepspeed__config": f"zero{zero}"}
    found |= {f"stages__{stage}__steps": steps for stage, steps in (("sft", 2), ("reward", 2), ("ppo", 1))}
    found |= {f"stages__{stage}__eval_rows": 8 for stage in ("sft", "reward")}
    if method == "qlora":
        found["base__dtype"] = "bf16"
    if method == "adalora":  # there must be a step to prune in
        found |= {f"stages__{stage}__steps": 4 for stage in ("sft", "reward")}
        found |= {"stages__ppo__epochs": 2}
    if not METHODS[method].shared:
        found["stages__ppo__adapter"] = options("lora")
    return found
