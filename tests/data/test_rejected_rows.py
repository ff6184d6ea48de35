"""Bad rows of a stage's data: listed beside the encoded rows, or, when they are too many, alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Recipe
from pipeline.data.check import Rejections
from pipeline.data.encoded import _write
from pipeline.data.shape import Example, Skip
from pipeline.data.split import place
from pipeline.errors import UserError

LINES = [
    *(json.dumps({"prompt": f"p{n}", "completion": "c", "id": n}) for n in range(30)),
    json.dumps({"prompt": "too long", "completion": "c", "id": 100}),
    json.dumps({"prompt": "again", "completion": "c", "id": 3}),
    '{"prompt": ',
]


def encode(example: Example) -> dict[str, Any]:
    if example.prompt == "too long":
        raise Skip("too long")
    return {"input_ids": [1, 2]}


def write(folder: Path, make_recipe: Callable[..., Recipe], most: float) -> None:
    (folder / "rows.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    recipe = make_recipe(holdout=0.0, sft={"data": [{"path": "rows.jsonl"}]})
    rejections = Rejections(folder / "rows" / "key.rejected.jsonl", most=most)
    _write(folder / "rows" / "key", place(recipe, "sft", folder), encode, "sft", rejections)


def test_bad_rows_are_listed_and_all_rows_counted(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    write(tmp_path, make_recipe, 0.07)  # 2 of 33 are bad, 6.1 %; one is too long
    folder = tmp_path / "rows" / "key"
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["key"]
    counts = json.loads((folder / "counts.json").read_text())["counts"]["rows.jsonl"]
    repeated = "an id that an earlier row has"
    assert counts == {"rows": 33, "used": 30, "too long": 1, repeated: 1, "not valid JSON": 1}
    listed = [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in listed] == [
        (31, "too long"),
        (32, repeated),
        (33, "not valid JSON"),
    ]


def test_too_many_leave_nothing_but_their_list(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"2 of 33 rows are bad.* All are listed in .*key\.rejected\.jsonl"):
        write(tmp_path, make_recipe, 0.06)
    assert [p.name for p in (tmp_path / "rows").iterdir()] == ["key.rejected.jsonl"]
    assert len((tmp_path / "rows" / "key.rejected.jsonl").read_text().splitlines()) == 3
    write(tmp_path, make_recipe, 0.07)
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["key"]
