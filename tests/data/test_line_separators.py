"""JSONL is split at line feeds alone; other Unicode line separators may stand unescaped inside a string."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.read import rows

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_row_may_hold_unicode_line_separators(tmp_path: Path, separator: str) -> None:
    fields = [{"prompt": f"one{separator}two", "completion": "yes"}, {"prompt": "three", "completion": "no"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in fields]
    (tmp_path / "web.jsonl").write_text("".join(lines), encoding="utf-8")
    found = list(rows(str(tmp_path / "web.jsonl")))
    assert [row.fields for row in found] == fields
    assert [row.number for row in found] == [1, 2]
