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
PAIRS = [{"path": "pairs.jsonl"}]
REWARD = {"of": ["reward", {"model": "org/judge"}], "data": PAIRS, "ood": [{"path": "others.jsonl"}]}
FORGETTING = {"of": ["base", "sft"], "perplexity": {"data": TEXT}}


def written(folder: Path, stage: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        **changes,
        "name": "r",
        "base": {"model": "some/base"},
        "stages": {
            "sft": {"kind": "sft", "data": [{"path": "rows.jsonl"}], "lr": 1e-4},
            "reward": {"kind": "reward", "data": PAIRS, "lr": 1e-4},
            "test": {"kind": "evaluate", **stage},
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "r.yaml"


PARTS = {"comparison": COMPARISON, "reward model": {"reward_model": REWARD}, "forgetting": {"forgetting": FORGETTING}}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone(part: str, tmp_path: Path) -> None:
    parents = ["reward"] if part == "reward model" else ["sft"]
    assert load(written(tmp_path, PARTS[part])).parents("test") == parents


def test_all_parts_together(tmp_path: Path) -> None:
    stage = {key: value for part in PARTS.values() for key, value in part.items()}
    assert load(written(tmp_path, stage)).parents("test") == ["sft", "reward"]


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
    "no reward model": ({"reward_model": {**REWARD, "of": []}}, "stages.test.reward_model.of", ["at least 1 item"]),
    "no pairs": ({"reward_model": {**REWARD, "data": []}}, "stages.test.reward_model.data", ["at least 1 item"]),
    "a policy as a reward model": (
        {"reward_model": {**REWARD, "of": ["sft"]}},
        "stages.test.reward_model.of",
        ['stage "sft" is of kind sft', "one of: reward"],
    ),
    "a reward model twice": (
        {"reward_model": {**REWARD, "of": ["reward", {"model": "org/reward"}]}},
        "stages.test.reward_model.of",
        ["called reward"],
    ),
    "a member called as all of them": (
        {"reward_model": {**REWARD, "of": ["reward", {"model": "org/ensemble"}]}},
        "stages.test.reward_model.of",
        ["called ensemble"],
    ),
    "other pairs that a stage learns from": (
        {"reward_model": {**REWARD, "ood": PAIRS}},
        "stages.test.reward_model.ood",
        ["pairs.jsonl, which stage reward reads under `data`"],
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


@pytest.mark.parametrize(("part", "key"), [("comparison", "prompts"), ("reward model", "reward_model.data")])
def test_nothing_held_out(part: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"stages.test.{key}: nothing is held out.*data.holdout is 0"):
        load(written(tmp_path, PARTS[part], data={"holdout": 0.0}))
