"""Which mixtures a recipe may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import load
from pipeline.errors import UserError
from tests.support import tiny

pytestmark = pytest.mark.fast

A, B = {"path": "a.jsonl"}, {"path": "b.jsonl"}
HOT = {"temperature": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"stages__sft__data": [{**A, "weight": 1}, {**B, "weight": 0.5}]},
        {"stages__reward__data": [A, B], "stages__reward__mix": HOT},
        {"stages__ppo__prompts": [{**A, "weight": 1}, {**B, "weight": 2}]},
        {"stages__ppo__ptx": {"data": [A, B], "mix": HOT}},
    ],
)
def test_mixtures(tmp_path: Path, changes: dict[str, Any]) -> None:
    load(tiny.recipe(tmp_path / "r.yaml", tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages__sft__data": [{**A, "weight": 1}, B]}, "stages.sft.data: a weight for a.jsonl and none for b.jsonl"),
        ({"stages__sft__data": [{**A, "weight": 1}], "stages__sft__mix": HOT}, "weights, and a temperature"),
        ({"stages__sft__data": [{**A, "weight": 0}]}, "greater than 0"),
        ({"stages__sft__mix": {"temperature": 0}}, "stages.sft.mix.temperature"),
        ({"stages__ppo__ptx": {"data": [{**A, "weight": 1}, B]}}, "stages.ppo.ptx.data"),
        (
            {
                "stages__evaluate": {
                    "kind": "evaluate",
                    "model": "ppo",
                    "against": "sft",
                    "prompts": [{**A, "weight": 1}],
                }
            },
            "evaluate uses each row once",
        ),
    ],
)
def test_mixtures_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        load(tiny.recipe(tmp_path / "r.yaml", tmp_path, **changes))
    assert words in str(raised.value)
