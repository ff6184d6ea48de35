"""What a stage kind is: its schema, the module to launch, and the keys that name upstream stages."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pipeline.config.distill import Distill
from pipeline.config.evaluate import Evaluate
from pipeline.config.export import Export
from pipeline.config.merge import Merge
from pipeline.config.preference import Dpo, Kto
from pipeline.config.prepare import Prepare
from pipeline.config.pretrain import Pretrain
from pipeline.config.schema import Classify, Ppo, Reward, Sft, Stage
from pipeline.config.selection import Selection

POLICIES = frozenset({"pretrain", "sft", "ppo", "dpo", "kto", "distill", "merge", "export"})
REWARDS = frozenset({"reward"})
DATA = frozenset({"prepare", "selection"})
"""Kinds whose output is rows: any list of data may name them by `stage`."""


@dataclass(frozen=True)
class Kind:
    """`inputs` maps a key of the stage's block to the kinds it may name; `base_ok` keys also accept the word `base`.

    Keys are dotted. `sources` are those that list data, `measured` those of them that a stage only measures itself on, whole;
    a classify stage's data is its task's. `model`: whether the stage has a model at all.
    """

    schema: type[Stage]
    module: str
    inputs: dict[str, frozenset[str]]
    base_ok: frozenset[str] = frozenset()
    sources: tuple[str, ...] = ("data",)
    measured: tuple[str, ...] = ()
    model: bool = True


KINDS: dict[str, Kind] = {
    "sft": Kind(Sft, "stages.sft", {"init": POLICIES}, base_ok=frozenset({"init"})),
    "reward": Kind(Reward, "stages.reward", {"init": POLICIES | REWARDS}, base_ok=frozenset({"init"})),
    "ppo": Kind(
        Ppo,
        "stages.ppo",
        {"policy": POLICIES, "reward": REWARDS, "gold": REWARDS},
        base_ok=frozenset({"policy"}),
        sources=("prompts", "ptx.data"),
    ),
    "evaluate": Kind(
        Evaluate,
        "stages.evaluate",
        {
            "model": POLICIES,
            "against": POLICIES,
            "reward": REWARDS,
            "reward_model.of": REWARDS,
            "forgetting.of": POLICIES,
        },
        base_ok=frozenset({"model", "against", "forgetting.of"}),
        sources=(
            "prompts",
            "reward_model.data",
            "reward_model.ood",
            "forgetting.perplexity.data",
            "forgetting.continuation.data",
        ),
        measured=("reward_model.ood", "forgetting.perplexity.data", "forgetting.continuation.data"),
    ),
    "pretrain": Kind(
        Pretrain,
        "stages.pretrain",
        {"init": POLICIES},
        base_ok=frozenset({"init"}),
        sources=("data", "general"),
        measured=("general",),
    ),
    "dpo": Kind(Dpo, "stages.preference", {"init": POLICIES}, base_ok=frozenset({"init"})),
    "kto": Kind(Kto, "stages.preference", {"init": POLICIES}, base_ok=frozenset({"init"})),
    "prepare": Kind(Prepare, "stages.prepare", {}, model=False),
    "selection": Kind(
        Selection,
        "stages.selection",
        {
            "reward.stage": REWARDS,
            "necessity.model": POLICIES,
            "coverage.embedding": POLICIES,
            "include": frozenset({"selection"}),
        },
        base_ok=frozenset({"necessity.model", "coverage.embedding"}),
    ),
    "merge": Kind(Merge, "stages.merge", {"of": POLICIES}, sources=()),
    "export": Kind(Export, "stages.export", {"policy": POLICIES}, sources=()),
    "classify": Kind(Classify, "stages.classify", {"init": POLICIES}, base_ok=frozenset({"init"}), sources=()),
    "distill": Kind(
        Distill,
        "stages.distill",
        {"init": POLICIES, "teacher.stage": POLICIES},
        base_ok=frozenset({"init", "teacher.stage"}),
    ),
}


def estimators() -> dict[str, Any]:
    """PPO's advantage estimators by name. They are declared beside their functions, in a module free of torch, and looked
    up by its name as stages are."""
    return dict(importlib.import_module(f"{KINDS['ppo'].module}.advantage").ESTIMATORS)
