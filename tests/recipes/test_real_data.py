"""The recipes on real data and a real tiny model, shortened; in full by scripts/seeds.py, results in docs/results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import handoff
from tests.support.session import Ranks

HERE = Path(__file__).parent
SHORT = ["stages.sft.steps=2", "stages.reward.steps=2", "stages.ppo.steps=1", "stages.ppo.rollout_batch=8",
         "stages.ppo.sampling.max_response_length=8", "stages.ppo.eval_rows=4", "stages.evaluate.rows=8",
         "stages.evaluate.sampling.max_response_length=8"]  # fmt: skip


@pytest.mark.parametrize(("name", "more"), [("hh", []), ("polite", ["stages.judge.steps=2"])])
def test_shortened(ranks: Callable[[int], Ranks], test_data: Path, tmp_path: Path, name: str, more: list[str]) -> None:
    """Every stage runs on the real rows, and the reward model is reported beside the longer-reply baseline."""
    recipe = str(HERE / f"{name}_stories260k.yaml")
    hashes = ranks(2).call(
        "tests.support.stages:chain", recipe=recipe, run_dir=str(tmp_path), overrides=[*SHORT, *more]
    )[0]
    assert {"sft", "reward", "ppo", "evaluate"} <= hashes.keys()
    reward = handoff.open_baton(tmp_path / "reward").manifest
    assert 0.4 < reward["metrics"]["held_out/longer_reply_accuracy"] < 0.65
    counts = reward["data"][0]
    parts = sum(v for k, v in counts.items() if k not in ("path", "sha256", "rows"))
    assert parts == counts["rows"], "a row disappeared uncounted"
