"""Stopped on some ranks under some ZeRO stage, resumed under another: the same weights, moments and place in the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]

SIZES = [(2, "zero2", 2), (1, "zero3", 3), (2, "zero1", 5), (1, "zero0", 6), (2, "zero3", None)]
"""(ranks, configuration, the step it is stopped after): every stage of ZeRO saves and loads."""
STEPS = 8


@pytest.fixture(scope="module")
def chain(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, undisturbed run) on two ranks under ZeRO-2."""
    folder = tmp_path_factory.mktemp("resize")
    changes: dict[str, Any] = {f"stages__{s}__steps": STEPS for s in ("sft", "ppo")}
    recipe = tiny.recipe(
        folder / "r.yaml",
        tiny_llama,
        **changes,
        stages__sft__save_every=STEPS,
        stages__ppo__save_every=STEPS,
        stages__ppo__kl={"coef": 0.1, "target": 1.0, "horizon": 100},
        stages__ppo__ema_decay=0.9,
        stages__ppo__normalize_scores=True,
        stages__ppo__critic={"init": "policy"},
        stages__ppo__lr=1e-3,
    )
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(folder / "run"))
    return recipe, folder / "run"


def rows(run: Path, stage: str, key: str) -> dict[int, dict[str, float]]:
    """The logged metrics by step, of those rows that have `key`."""
    found = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in found if key in row}) == len([row for row in found if key in row])
    return {row["step"]: row for row in found if key in row}


def manifest(run: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((run / stage / "output" / "manifest.json").read_text()))


@pytest.mark.parametrize(
    ("stage", "loss", "others"),
    [
        ("sft", "loss", ["learning_rate", "grad_norm"]),
        (
            "ppo",
            "loss/policy_avg",
            ["objective/kl", "objective/kl_coef", "objective/scores", "lr/policy", "loss/value_avg"],
        ),
    ],
)
def test_every_zero_stage_saves_and_loads(
    ranks: Get, chain: tuple[Path, Path], tmp_path: Path, stage: str, loss: str, others: list[str]
) -> None:
    recipe, undisturbed = chain
    run = tmp_path / "run"
    run.mkdir()
    for parent in ("sft", "reward") if stage == "ppo" else ():
        (run / parent).symlink_to(undisturbed / parent)
    before, done = None, 0
    for world, config, stop in SIZES:
        kept = tmp_path / f"{world}-{config}"
        ranks(world).call(
            "tests.support.resizing:run",
            recipe=str(recipe),
            stage=stage,
            run_dir=str(run),
            config=config,
            stop=stop and stop - done,
            folder=str(kept),
        )
        if before is not None:
            saved, loaded = np.load(before / "saved.npz"), np.load(kept / "loaded.npz")
            assert set(saved) == set(loaded)
            assert any(name.endswith("exp_avg") and saved[name].any() for name in saved)
            for name in saved:
                np.testing.assert_array_equal(loaded[name], saved[name], err_msg=f"{name}, to {config} on {world}")
        before, done = kept, stop or STEPS
    found, expected = rows(run, stage, loss), rows(undisturbed, stage, loss)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step in expected:
        for key in (loss, *others):
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-3, abs=1e-4), (step, key)
    sizes = manifest(run, stage)["sizes"]
    assert [(s["from_step"], s["ranks"], s["config"]) for s in sizes] == [
        (0, 2, "zero2"),
        (2, 1, "zero3"),
        (3, 2, "zero1"),
        (5, 1, "zero0"),
        (6, 2, "zero3"),
    ]
    assert "sizes" not in manifest(undisturbed, stage)
