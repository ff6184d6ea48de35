"""Rows to Parquet and back: every value as it was, rows of different shapes side by side, the same bytes each time."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from pipeline.data import read
from pipeline.data.row import Row
from pipeline.data.shards import Shards, storable

pytestmark = pytest.mark.fast

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "p", "completion": "c", "id": 1},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": None},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "tags": ["x", "y"]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": CALL}], "tags": []},
    {"prompt": "p", "completion": "c", "id": "one"},
    {"prompt": "p", "completion": "c", "id": 2**70},
    {"prompt": "p", "completion": "c", "id": {"any": [1, None, {"deep": {}}]}},
    {"prompt": None, "completion": "c", "id": True},
]


def written(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with Shards(folder) as shards:
        for row in rows:
            shards.add(row)
    return [row.fields for row in read.rows(str(folder)) if isinstance(row, Row)]


def test_rows_of_any_shape_come_back_as_they_were(tmp_path: Path) -> None:
    found = written(tmp_path / "data", ROWS)
    assert sorted(map(repr, map(sorted_items, found))) == sorted(map(repr, map(sorted_items, ROWS)))


def sorted_items(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(row.items(), key=lambda item: item[0])


def test_plain_messages_are_a_column_that_other_programs_read(tmp_path: Path) -> None:
    written(tmp_path, ROWS[3:4])
    (file,) = tmp_path.iterdir()
    assert parquet.read_table(file).to_pylist() == [ROWS[3]]


def test_a_gap_makes_no_new_file(tmp_path: Path) -> None:
    rows = [{"text": "t", "score": None if n % 2 else n / 10} for n in range(10)]
    assert written(tmp_path, rows) == rows
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        written(tmp_path / name, ROWS)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]


def test_row_groups_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.shards.GROUP_ROWS", 4)
    monkeypatch.setattr("pipeline.data.shards.FILE_ROWS", 8)
    rows = [{"text": str(n)} for n in range(18)]
    assert written(tmp_path, rows) == rows
    files = sorted(tmp_path.iterdir())
    assert [parquet.ParquetFile(f).metadata.num_rows for f in files] == [8, 8, 2]
    assert [parquet.ParquetFile(f).metadata.num_row_groups for f in files] == [2, 2, 1]


def test_lone_surrogates_become_what_utf_8_can_hold() -> None:
    assert storable({"a": ["\ud83d\udca9", {"b": "x\ud83d"}], "n": 1}) == {
        "a": ["\U0001f4a9", {"b": "x\ufffd"}],
        "n": 1,
    }
