"""The shipped chains on the embedded default, shortened: every stage runs and reads what the one before handed on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import handoff
from pipeline.config.recipe import load
from pipeline.stage import execute
from stages.prepare import prepare
from tests.support.session import Ranks

SFT = ["sft.steps=2", "sft.batch=4", "sft.eval_rows=16"]
LITTLE = [*SFT, "reward.steps=2", "reward.batch=8"]
SHORT = {
    "domain": [
        *LITTLE,
        "pretrain.steps=2",
        "pretrain.eval_rows=16",
        "ppo.steps=1",
        "ppo.rollout_batch=8",
        "ppo.eval_rows=4",
        "ppo.sampling.max_response_length=8",
    ],
    "dpo": [*SFT, "dpo.steps=2", "dpo.batch=8", "dpo.eval_rows=16", "evaluate.rows=8"],
    "mods": [*LITTLE, "select.budget=16", "select.data=[{stage: prepare, limit: 48}]"],
}


@pytest.mark.parametrize("name", SHORT)
def test_chain(ranks: Callable[[int], Ranks], tmp_path: Path, name: str) -> None:
    overrides = [f"stages.{change}" for change in SHORT[name]]
    recipe = load(name, overrides)
    for stage in recipe.order():
        if recipe.stages[stage].kind == "prepare":  # a program of one process, which warm ranks are not
            execute(prepare, name, stage, tmp_path, overrides, 0, 1)
        else:
            asked = {"recipe": name, "stage": stage, "run_dir": str(tmp_path), "overrides": overrides}
            ranks(2).call("tests.support.stages:run", **asked)
    batons = {stage: handoff.open_baton(tmp_path / stage) for stage in recipe.stages}
    for stage, baton in batons.items():
        parents = {parent: batons[parent].content_hash for parent in recipe.parents(stage)}
        assert baton.manifest["parents"] == parents
    if name == "mods":
        assert batons["sft"].manifest["data"][0]["used"] == 16
