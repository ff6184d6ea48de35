"""What a selection stage's block may say, what it asks of the stages it names, and what it needs of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from pipeline import memory
from pipeline.config.recipe import load
from pipeline.errors import UserError
from tests.support import tiny

pytestmark = pytest.mark.fast

GONE = object()
DATA = [{"path": "rows.jsonl", "share": 0.3}]
SELECTION = {"kind": "selection", "data": DATA, "reward": "reward", "quality": {"keep": 0.5}}
RECIPE: dict[str, Any] = {
    "name": "mods",
    "base": {"model": str(tiny.QUICKSTART / "base"), "dtype": "fp32"},
    "stages": {
        "reward": {"kind": "reward", "data": [{"path": "rows.jsonl", "share": 0.4}], "lr": 1e-4},
        "seed": {**SELECTION, "budget": 10},
        "sft_seed": {"kind": "sft", "data": [{"stage": "seed"}], "lr": 1e-4},
        "select": {
            **SELECTION,
            "budget": 20,
            "necessity": {"model": "sft_seed", "threshold": 0.0},
            "include": "seed",
        },
        "sft": {"kind": "sft", "data": [{"stage": "select"}], "lr": 1e-4},
    },
}


def written(folder: Path, changes: dict[str, Any]) -> Path:
    value = json.loads(json.dumps(RECIPE))  # a deep copy keeps what blocks share
    for key, change in changes.items():
        node, (*parts, last) = value, key.split(".")
        for part in parts:
            node = node.setdefault(part, {})
        if change is GONE:
            del node[last]
        else:
            node[last] = change
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def test_order_and_shares(tmp_path: Path) -> None:
    """Both selections look at the part that the first one takes: 0.4 to 0.7 of the prompts, after the reward model's."""
    recipe = load(written(tmp_path, {}))
    assert recipe.order() == ["reward", "seed", "sft_seed", "select", "sft"]
    assert recipe.parents("select") == ["reward", "sft_seed", "seed"]
    parts = [recipe.interval(stage, recipe.stages[stage].data[0]) for stage in ("seed", "select", "sft")]  # type: ignore[attr-defined]
    assert parts == [(0.4, pytest.approx(0.7)), (0.4, pytest.approx(0.7)), (0.0, 1.0)]


def test_parts_of_a_split(tmp_path: Path) -> None:
    plain = [{"path": "rows.jsonl"}]
    changes = {f"stages.{stage}.data": plain for stage in ("reward", "seed", "select")}
    recipe = load(written(tmp_path, {**changes, "data": {"split": {"seed": 1, "reward": 3}}}))
    assert recipe.interval("select", recipe.stages["select"].data[0]) == (0.0, 0.25)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"stages.select.quality.keep": GONE}, "stages.select.quality", ["`threshold` or `keep`"]),
        ({"stages.select.necessity.keep": 0.5}, "stages.select.necessity", ["not both"]),
        ({"stages.seed.quality": {"kep": 0.5}}, "stages.seed.quality.kep", ["write `keep`"]),
        ({"stages.seed.reward": GONE}, "stages.seed", ["name it by `reward`"]),
        ({"stages.seed.quality": GONE}, "stages.seed", ["nothing uses the scores"]),
        ({"stages.seed.reward": {"stage": "reward", "model": "a/b"}}, "stages.seed.reward", ["not both"]),
        ({"stages.seed.reward": {"modle": "a/b"}}, "stages.seed.reward.modle", ["write `model`"]),
        ({"stages.seed.reward": "reword"}, "stages.seed.reward.stage", ["no stage named", "reward"]),
        ({"stages.seed.reward": "sft_seed"}, "stages.seed.reward.stage", ["is of kind sft"]),
        ({"stages.select.necessity.model": "reward"}, "stages.select.necessity.model", ["kind reward", "sft_seed", "base"]),
        ({"stages.select.include": "sft_seed"}, "stages.select.include", ["is of kind sft"]),
        ({"stages.select.include": "select"}, "stages.select", ["wait for each other"]),
        ({"stages.select.budget": 10}, "stages.select.budget", ["more than 10"]),
        ({"stages.select.max_length": 64}, "stages.select.max_length", ["copy it from seed"]),
        ({"stages.select.data": [{"path": "other.jsonl"}]}, "stages.select.data", ["the same rows", "copy it"]),
        ({"stages.seed.data": [{"path": "r", "limit": 9}]}, "stages.seed.budget", ["10 rows of at most 9"]),
        ({"stages.seed.data": [{"path": "r", "weight": 1}]}, "stages.seed.data", ["every row once"]),
        ({"stages.select.sampling": {"engine": "deepspeed"}}, "stages.select", ["depend on the ranks"]),
        ({"data.split": {"select": 1}}, "data.split.select", ["remove it"]),
        ({"stages.reward.data": [{"path": "rows.jsonl", "share": 0.8}]}, "stages.seed", ["add up to 1.1"]),
        ({"stages.sft.init": "select"}, "stages.sft.init", ["is of kind selection"]),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, changes: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(written(tmp_path, changes))
    assert error.value.where == f"recipe r.yaml: {where}"
    for word in words:
        assert word in str(error.value)


def test_memory_is_that_of_frozen_models(tmp_path: Path) -> None:
    """The base, which all share, two adapters and a head; nothing trains, and the seed set's selection samples nothing."""
    recipe = load(written(tmp_path, {}))
    one, both = memory.estimate(recipe, "seed", kind="cpu"), memory.estimate(recipe, "select", kind="cpu")
    assert (one.trained, both.trained) == (0, 0)
    assert set(one.phases) == {"loading", "scoring"}
    assert set(both.phases) == {"loading", "rollout", "scoring"}
    with safe_open(tiny.QUICKSTART / "base" / "model.safetensors", "np") as file:
        held = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert one.parameters == both.parameters == held
    assert both.phases["scoring"].adapters > one.phases["scoring"].adapters > 0
