"""Bad rows are listed and counted, and stop a stage when there are too many."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.check import REPEATED, Checked, Rejections, _Ids, examples
from pipeline.data.read import Bad, Row, rows
from pipeline.data.shape import Example, demonstration, preference, prompt_only
from pipeline.errors import UserError

pytestmark = pytest.mark.fast


def chosen(row: Row) -> Example:
    return demonstration(row, "chosen")


def given(listed: Iterable[dict[str, Any]], file: str = "a.jsonl") -> list[Row | Bad]:
    return [Row(fields, file, number) for number, fields in enumerate(listed, 1)]


GOOD = {"prompt": "p", "completion": "c"}
EMPTY = {"prompt": "p", "completion": " "}


def test_every_row_is_used_or_counted_and_bad_ones_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rejected.jsonl"
    read = [
        *given([GOOD, EMPTY, {"prompt": "long " * 100}, {"prompt": "p", "completion": "c", "label": False}]),
        Bad("a.jsonl", 5, "not UTF-8", "byte 7"),
    ]
    with Rejections(path, most=1.0) as rejections:
        used = list(examples("data", read, chosen, rejections))
        rejections.add("data", used[0][0], "too long", detail="900 tokens, 512 allowed", bad=False)
        assert not path.exists()
    assert [(row.number, example) for row, example in used] == [(1, Example("p", "c"))]
    assert rejections.rows == {"data": 5}
    assert rejections.reasons["data"] == {
        "empty reply": 1,
        "missing: completion": 1,
        "labelled bad": 1,
        "not UTF-8": 1,
        "too long": 1,
    }
    assert rejections.bad["data"] == {"empty reply": 1, "missing: completion": 1, "not UTF-8": 1}
    listed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    at = {"source": "data", "file": "a.jsonl"}
    assert listed[0] == {**at, "row": 2, "reason": "empty reply", "content": "prompt: p; completion:  "}
    assert listed[1]["content"] == ("prompt: " + "long " * 100)[:200]
    assert listed[2] == {**at, "row": 5, "reason": "not UTF-8", "detail": "byte 7"}
    assert listed[3]["reason"] == "too long"
    assert [p.name for p in path.parent.iterdir()] == ["rejected.jsonl"]


def test_without_a_bad_row_there_is_no_list(tmp_path: Path) -> None:
    with Rejections(tmp_path / "rejected.jsonl") as rejections:
        list(examples("data", given([GOOD]), chosen, rejections))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_reading_leaves_no_half_of_a_list(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Rejections(tmp_path / "rejected.jsonl") as rejections:
            rejections.add("data", Bad("a.jsonl", 1, "not UTF-8"), "not UTF-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_more_than_5_percent_stop_once_the_source_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    bad = [EMPTY] * 4 + [{"prompt": "p"}] * 2
    allowed = Rejections(path)
    assert len(list(examples("data", given([*bad, *[GOOD] * 114]), chosen, allowed))) == 114  # 6 of 120 are 5 %
    with pytest.raises(UserError) as raised:
        list(examples("data", given([*bad, *[GOOD] * 113]), chosen, Rejections(path)))
    for word in (
        "data data: 6 of 119 rows are bad, above 0.05 of all: empty reply (4), missing: completion (2).",
        "The first: a.jsonl, row 1: empty reply",
        f"All are listed in {path}",
        "max_bad",
    ):
        assert word in str(raised.value)
    assert len(path.read_text().splitlines()) == 6


def test_rows_that_are_too_long_or_unwanted_do_not_stop() -> None:
    rejections = Rejections()
    unwanted = given([{**GOOD, "label": False}] * 9 + [GOOD])
    for row, _ in examples("data", unwanted, chosen, rejections):
        rejections.add("data", row, "too long", bad=False)
    rejections.finish("data")
    assert rejections.reasons["data"].total() == 10


def test_on_bad_row_stop_stops_at_the_first(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    reading = examples("data", given([GOOD, EMPTY, GOOD]), chosen, Rejections(path, on_bad_row="stop"))
    next(reading)
    with pytest.raises(UserError, match=r"data a\.jsonl, row 2: empty reply\. (?s:.*)on_bad_row: reject"):
        next(reading)
    assert len(path.read_text().splitlines()) == 1
    cut = [*given([GOOD]), Bad("a.jsonl", 2, "the file cannot be read from here on", "EOF")]
    with pytest.raises(UserError, match=r"row 2: the file cannot be read from here on \(EOF\)"):
        list(examples("data", cut, chosen, Rejections(on_bad_row="stop")))


def test_a_source_of_no_known_shape_is_refused_early_and_names_its_columns() -> None:
    strange = {"Question": "q", "turns": ["a"]}
    reading = iter(given([strange] * 1000))
    with pytest.raises(UserError, match=r"its columns are Question, turns\n  expected one of: text; messages"):
        list(examples("data", reading, chosen, Rejections()))
    assert next(reading).number == 101
    with pytest.raises(UserError, match="no row has a shape that is recognised"):
        list(examples("data", given([strange]), chosen, Rejections()))
    with pytest.raises(UserError, match="data data: it holds no row"):
        list(examples("data", [], chosen, Rejections()))


def test_repeated_ids_leave_the_first(tmp_path: Path) -> None:
    listed = [{**GOOD, "id": n} for n in (1, 2, "1", 1, None, None, "", "", True)]
    rejections = Rejections(most=1.0)
    used = [row.number for row, _ in examples("data", given(listed), chosen, rejections)]
    assert used == [1, 2, 3, 5, 6, 7, 8, 9]
    assert rejections.reasons["data"] == {REPEATED: 1}


def test_ids_are_kept_in_at_most_32_bytes_each() -> None:
    ids = _Ids()
    assert all(ids.new(n) for n in range(50_000))
    assert not any(ids.new(n) for n in range(50_000))
    assert len(ids.table) * ids.table.itemsize <= 32 * 50_000 * 1.4  # a power of two


def test_an_id_of_a_row_that_is_bad_is_free() -> None:
    used = list(examples("data", given([{**EMPTY, "id": 1}, {**GOOD, "id": 1}]), chosen, Rejections(most=1.0)))
    assert [row.number for row, _ in used] == [2]


def test_messages_among_plain_text_are_refused_in_one_file_and_not_in_two() -> None:
    chat = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}
    rejections = Rejections(most=1.0)
    mixed = [*given([GOOD, chat, GOOD]), *given([chat, GOOD], "b.jsonl")]
    assert len(list(examples("data", mixed, chosen, rejections))) == 3
    assert rejections.reasons["data"] == {
        "messages in a file of plain text": 1,
        "plain text in a file of messages": 1,
    }


def test_a_preference_file_among_demonstrations_is_read_for_sft() -> None:
    mixed = given([GOOD, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"text": "t"}])
    assert len(list(examples("data", mixed, Checked(chosen), Rejections()))) == 3
    with pytest.raises(UserError, match=r"2 of 3 rows are bad.*missing: chosen, rejected \(2\)"):
        list(examples("data", mixed, preference, Rejections()))


def test_real_preferences_are_all_accounted_for(hh_rlhf: Path, tmp_path: Path) -> None:
    """36 equal, 17 with differing prompts and 11 empty replies of 8552: the data's README, by another program."""
    path = tmp_path / "rejected.jsonl"
    with Rejections(path) as rejections:
        used = sum(1 for _ in examples("hh", rows(str(hh_rlhf)), preference, rejections))
    reasons = rejections.reasons["hh"]
    assert (used, rejections.rows["hh"]) == (8552 - 64, 8552)
    assert sorted(reasons.values()) == [11, 17, 36]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 64
    with pytest.raises(UserError):
        list(examples("mt", rows(str(hh_rlhf.parent / "mt-bench" / "question.jsonl")), prompt_only, Rejections()))
