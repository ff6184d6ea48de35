"""What an evaluate stage refuses before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.recipe import load
from pipeline.errors import UserError

TEXT = [{"path": "general.jsonl"}]
COMPARISON = {"model": "sft", "against": "base", "prompts": [{"path": "prompts.jsonl"}]}
FORGETTING = {"of": ["base", "sft"], "perplexity": {"data": TEXT}}


def written(folder: Path, stage: dict[str, Any]) -> Path:
    recipe = {
        "name": "r",
        "base": {"model": "some/base"},
        "stages": {
            "sft": {"kind": "sft", "data": [{"path": "rows.jsonl"}], "lr": 1e-4},
            "test": {"kind": "evaluate", **stage},
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "r.yaml"


@pytest.mark.parametrize("stage", [COMPARISON, {"forgetting": FORGETTING}, {**COMPARISON, "forgetting": FORGETTING}])
def test_parts_alone_and_together(stage: dict[str, Any], tmp_path: Path) -> None:
    assert load(written(tmp_path, stage)).parents("test") == ["sft"]


def test_models_that_no_stage_made(tmp_path: Path) -> None:
    given = {"of": ["base", {"model": "org/other", "revision": "main"}], "perplexity": {"data": TEXT}}
    assert load(written(tmp_path, {"forgetting": given})).parents("test") == []


CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "nothing to test": ({}, "stages.test", ["nothing to test", "`forgetting`"]),
    "half a comparison": ({"model": "sft", "against": "base"}, "stages.test", ["`prompts`", "prompts is missing"]),
    "a judge without a comparison": (
        {"forgetting": FORGETTING, "judge": "a.b:c"},
        "stages.test",
        ["a comparison needs", "model is missing"],
    ),
    "nothing to measure": ({"forgetting": {"of": ["sft"]}}, "stages.test.forgetting", ["nothing to measure", "gsm8k"]),
    "no policy": ({"forgetting": {**FORGETTING, "of": []}}, "stages.test.forgetting.of", ["at least 1 item"]),
    "a policy twice": (
        {"forgetting": {**FORGETTING, "of": ["sft", "sft"]}},
        "stages.test.forgetting.of",
        ["called sft"],
    ),
    "a stage that is not there": (
        {"forgetting": {**FORGETTING, "of": ["base", "ppo"]}},
        "stages.test.forgetting.of",
        ['no stage named "ppo"', "one of: sft, base"],
    ),
    "a stage and a model": (
        {**COMPARISON, "model": {"stage": "sft", "model": "some/model"}},
        "stages.test.model",
        ["not both"],
    ),
    "a budget for what is not measured": (
        {"forgetting": {**FORGETTING, "max_loss": {"gsm8k/exact_match": 0.1}}},
        "stages.test.forgetting.max_loss",
        ["no measure gsm8k/exact_match", "perplexity/loss"],
    ),
    "more of the samples than there are": (
        {"forgetting": {"of": ["sft"], "code": {"path": "p.jsonl", "k": [1, 10]}}},
        "stages.test.forgetting.code",
        ["pass@10", "write `samples: 10`"],
    ),
    "shots from nowhere": (
        {"forgetting": {"of": ["sft"], "gsm8k": {"path": "p.jsonl", "shots": 5}}},
        "stages.test.forgetting.gsm8k",
        ["shots are taken from `train`"],
    ),
    "a task by name and by path": (
        {"forgetting": {"of": ["sft"], "tasks": [{"name": "piqa", "path": "piqa.yaml"}]}},
        "stages.test.forgetting.tasks.0",
        ["not both"],
    ),
    "text that a stage learns from": (
        {"forgetting": {"of": ["sft"], "perplexity": {"data": [{"path": "rows.jsonl"}]}}},
        "stages.test.forgetting.perplexity.data",
        ["rows.jsonl, which stage sft reads under `data`"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message_names_the_key(case: tuple[dict[str, Any], str, list[str]], tmp_path: Path) -> None:
    stage, place, words = case
    with pytest.raises(UserError) as raised:
        load(written(tmp_path, stage))
    message = str(raised.value)
    assert message.startswith(f"recipe r.yaml: {place}:")
    assert all(word in message for word in words), message
