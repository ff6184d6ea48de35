"""The shipped rlvr recipe on GSM8K's own rows with a tiny model: no reward stage, and the reward is the check alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import handoff
from pipeline.config.recipe import load
from tests.support.session import Ranks

PATH = '"${RELAY_TEST_DATA}/gsm8k/train.jsonl.gz"'
SHORT = [
    'base={model: "${RELAY_TEST_DATA}/stories260K", dtype: fp32}',
    "tracking={}",
    f"stages.sft.data=[{{path: {PATH}, share: 0.3, limit: 64}}]",
    f"stages.rlvr.prompts=[{{path: {PATH}, share: 0.7, limit: 64}}]",
    "stages.sft.steps=2",
    "stages.sft.batch=8",
    "stages.sft.micro_batch=4",
    "stages.rlvr.steps=2",
    "stages.rlvr.rollout_batch=16",
    "stages.rlvr.samples_per_prompt=4",
    "stages.rlvr.eval_every=2",
    "stages.rlvr.eval_rows=4",
    "stages.rlvr.sampling.max_response_length=12",
]


@pytest.mark.fast
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_estimators(estimator: str) -> None:
    stages = load("rlvr", [f"stages.rlvr.advantage_estimator={estimator}"]).stages
    assert [block.kind for block in stages.values()] == ["sft", "ppo"]


def test_shortened(ranks: Callable[[int], Ranks], test_data: Path, tmp_path: Path) -> None:
    ranks(2).call("tests.support.stages:chain", recipe="rlvr", run_dir=str(tmp_path), overrides=SHORT)
    manifest = handoff.open_baton(tmp_path / "rlvr").manifest
    counts = manifest["data"][0]
    assert counts["over the limit"] > 4000
    assert counts["used"] == 64
    lines = [json.loads(line) for line in (tmp_path / "rlvr" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["objective/scores"] for line in lines if "objective/scores" in line]
    assert len(scores) == 2
    assert all(0.0 <= score <= 1.1 for score in scores)  # a check's 0 or 1, and a tenth for the form
    assert 0.0 <= manifest["metrics"]["eval/score"] <= 1.1
