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

SIZES = [(2, "zero2", 2), (1, "zero3", 3), (2, "zero1", 5), (1, "zero0", 6), (2, "zero3", 8)]
"""(ranks, configuration, the step it ends with): every ZeRO stage saves, and every one loads what another saved."""
STEPS = 8


@pytest.fixture(scope="module")
def undisturbed(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run directory) on two ranks under ZeRO-2."""
    folder = tmp_path_factory.mktemp("resize")
    changes: dict[str, Any] = {f"stages__{stage}__steps": STEPS for stage in ("sft", "ppo")}
    recipe = tiny.recipe(
        folder / "r.yaml",
        tiny_llama,
        **changes,
        stages__sft__save_every=None,
        stages__sft__eval_every=1,
        stages__sft__publish="best",
        stages__ppo__save_every=STEPS,
        stages__ppo__kl={"coef": 0.1, "target": 1.0, "horizon": 100},
        stages__ppo__critic={"init": "policy"},
        stages__ppo__normalize_scores=True,
        stages__ppo__ema_decay=0.9,
        stages__ppo__publish="ema",
        stages__ppo__lr=1e-3,
    )
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(folder / "run"))
    return recipe, folder / "run"


def logged(run: Path, stage: str, key: str) -> dict[int, dict[str, float]]:
    """The metrics by step, of those rows that have `key`."""
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if key in row}


def manifest(run: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((run / stage / "output" / "manifest.json").read_text()))


def weights(run: Path, stage: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / stage / "output" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("stage", "columns"),
    [
        ("sft", ["loss", "learning_rate"]),
        ("ppo", ["loss/policy_avg", "loss/value_avg", "objective/kl", "objective/kl_coef", "lr/policy", "lr/critic"]),
    ],
)
def test_every_size_goes_on_where_another_stopped(
    ranks: Get, undisturbed: tuple[Path, Path], tmp_path: Path, stage: str, columns: list[str]
) -> None:
    """Five sizes share a training: each holds, right after loading, what the one before held as it saved, bit by bit, and
    the metrics are the undisturbed run's but for rounding."""
    recipe, other = undisturbed
    run, before, done = tmp_path / "run", None, 0
    run.mkdir()
    for parent in ("sft", "reward") if stage == "ppo" else ():
        (run / parent).symlink_to(other / parent)
    for world, config, end in SIZES:
        kept = tmp_path / f"{world}-{config}"
        ranks(world).call(
            "tests.support.resizing:run",
            recipe=str(recipe),
            stage=stage,
            run_dir=str(run),
            config=config,
            stop=end - done,
            folder=str(kept),
        )
        if before is not None:
            saved, loaded = np.load(before / "saved.npz"), np.load(kept / "loaded.npz")
            assert set(saved) == set(loaded)
            assert any(saved[name].any() for name in saved if name.endswith("/exp_avg"))
            for name in saved:
                np.testing.assert_array_equal(loaded[name], saved[name], err_msg=f"{name}, on {world} under {config}")
        before, done = kept, end

    found, expected = (logged(folder, stage, columns[0]) for folder in (run, other))
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, row in expected.items():
        for column in columns:
            assert found[step][column] == pytest.approx(row[column], rel=1e-3, abs=1e-4), (step, column)
    for name, value in weights(other, stage).items():
        np.testing.assert_allclose(weights(run, stage)[name], value, atol=2e-3, err_msg=name)

    sizes = [(size["from_step"], size["ranks"], size["config"]) for size in manifest(run, stage)["sizes"]]
    assert sizes == [(0, 2, "zero2"), (2, 1, "zero3"), (3, 2, "zero1"), (5, 1, "zero0"), (6, 2, "zero3")]
    assert "sizes" not in manifest(other, stage), "a training of one size is recorded as ever"
