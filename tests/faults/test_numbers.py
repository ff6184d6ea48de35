"""Numbers that go wrong in stages on TRL's trainers: Trouble that names the step, the last good checkpoint kept and used.

PPO's are in tests/distributed/test_ppo_options.py and tests/e2e/test_trouble.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint
from tests.support import preferences, tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
STEPS = {
    f"stages__{stage}__{key}": value for stage in ("sft", "reward") for key, value in (("steps", 4), ("save_every", 2))
}


@pytest.mark.parametrize(
    ("stage", "config"), [("sft", "zero2"), ("reward", "zero3"), ("dpo", "zero0")], ids=["sft", "reward", "dpo"]
)
def test_a_gradient_that_is_not_finite_is_never_saved(
    ranks: Get, tiny_llama: Path, tmp_path: Path, stage: str, config: str
) -> None:
    """NaN from step 4 on, of which only the checkpoint of step 2 knows nothing; once it is gone the stage ends as ever."""
    changes: dict[str, Any] = {**STEPS, "deepspeed": {"config": config, "num_gpus": 2}}
    if stage == "dpo":
        more = {"kind": "dpo", "init": "base", "steps": 4, "save_every": 2}
        recipe = preferences.recipe(tmp_path, tiny_llama, {"dpo": more}, **changes)
    else:
        recipe = tiny.recipe(tmp_path / "r.yaml", tiny_llama, **changes)
    for run in ("whole", "run"):
        (tmp_path / run).mkdir()
    one = {"recipe": str(recipe), "stage": stage}
    whole = ranks(2).call("tests.support.stages:run", **one, run_dir=str(tmp_path / "whole"))

    run = tmp_path / "run"
    for said in ranks(2).call("tests.support.numbers:poisoned", **one, run_dir=str(run), step=4):
        assert said.startswith(f"stage {stage}, step 4: a gradient is not finite")
        assert "the last good checkpoint is kept" in said
    assert checkpoint.steps(run / stage / "checkpoints") == [2]
    assert checkpoint.damage(run / stage / "checkpoints" / "checkpoint-2") is None
    assert not (run / stage / "output").exists()
    assert ranks(2).call("tests.support.stages:run", **one, run_dir=str(run)) == whole


def test_a_held_out_loss_that_is_not_finite_ends_the_stage(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """A weight breaks after step 3, before it is evaluated and saved."""
    recipe = tiny.recipe(tmp_path / "r.yaml", tiny_llama, stages__sft__eval_every=1)
    run = tmp_path / "run"
    said = ranks(2).call(
        "tests.support.numbers:poisoned_after", recipe=str(recipe), stage="sft", run_dir=str(run), step=3
    )
    assert all(text.startswith("stage sft, step 3: the eval_loss is nan") for text in said)
    assert checkpoint.steps(run / "sft" / "checkpoints") == [2]
    assert not (run / "sft" / "output").exists()


@pytest.mark.parametrize(("stage", "zero"), [("sft", 2), ("ppo", 3)])
def test_a_loss_scale_that_collapses_ends_the_stage(
    ranks: Get, tiny_llama: Path, tmp_path: Path, stage: str, zero: int
) -> None:
    """Gradients overflow at every loss scale from 2^44 to the smallest that the configuration allows, 2^40: four steps are left
    out and halve it, and the fifth is the last."""
    config = tmp_path / "mine.json"
    scale = {"initial_scale_power": 44, "min_loss_scale": 2**40, "hysteresis": 1}
    config.write_text(json.dumps({"fp16": scale, "zero_optimization": {"stage": zero}}))
    changes = {f"stages__{name}__steps": 20 for name in ("sft", "ppo")}
    recipe = tiny.recipe(
        tmp_path / "r.yaml",
        tiny_llama,
        **changes,
        base__dtype="fp16",
        deepspeed={"config": str(config), "num_gpus": 1},
        stages__sft__save_every=20,
        stages__ppo__policy="base",
        stages__ppo__critic={"init": "policy"},
        stages__ppo__minibatches=1,
        stages__ppo__reward=[{"function": "tests.distributed.option_cases:sevens"}],
        stages__ppo__save_every=20,
    )
    run = tmp_path / "run"
    (said,) = ranks(1).call("tests.support.numbers:in_fp16", recipe=str(recipe), stage=stage, run_dir=str(run))
    assert said.startswith(
        f"stage {stage}, step 5: a gradient overflows in fp16 with the loss scale at its minimum, 1.09951e+12"
    )
    assert "5 steps were left out" in said
    assert "fix: write `dtype: bf16` under `base`" in said
    assert checkpoint.steps(run / stage / "checkpoints") == []
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss_scale"] for row in rows if "loss_scale" in row] == [2.0**43, 2.0**42, 2.0**41, 2.0**40]
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [1, 2, 3, 4]
