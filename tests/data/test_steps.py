"""A prepare stage's steps: their order matters, every row is counted once, and processes do not matter."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.config.prepare import Prepare
from pipeline.data.decontaminate import Evaluation
from pipeline.data.parallel import FEW, ordered
from pipeline.data.row import Bad, Row
from pipeline.data.steps import EXAMPLES, Ledger, Passage, Steps

pytestmark = pytest.mark.fast


def steps_of(*steps: Any) -> list[Any]:
    return Prepare.model_validate({"kind": "prepare", "data": [{"path": "rows.jsonl"}], "steps": list(steps)}).steps


def run(
    steps: list[Any], rows: list[Row | Bad], evaluations: dict[int, Evaluation] | None = None
) -> tuple[Ledger, list[str], list[Any]]:
    """The ledger, the texts that stay, and (step, row, detail) of the rows that do not."""
    ledger = Ledger(steps)
    kept, gone = [], []
    for passage in Steps(steps, evaluations or {}).run_all(("a.jsonl", row) for row in rows):
        if why := ledger.enter(passage):
            gone.append((why.step, passage.row.number, why.detail))
        else:
            kept.append(passage.fields["text"])
    for count, following in zip(list(ledger.counts.values()), list(ledger.counts.values())[1:], strict=False):
        assert count.after == following.before
    assert ledger.counts[-1].before == len(rows) == ledger.kept + len(gone)
    return ledger, kept, gone


def texts(*values: str) -> list[Row | Bad]:
    return [Row({"text": value}, "a.jsonl", number) for number, value in enumerate(values, 1)]


def test_order_is_the_recipes() -> None:
    """Twelve letters in bold are long enough before the tags are gone, and not after."""
    rows = texts("<b>twelve letters</b>", "long enough as it is, truly")
    long, html = {"length": {"min": 20}}, "html"
    assert run(steps_of(long, html), rows)[1] == ["twelve letters", "long enough as it is, truly"]
    assert run(steps_of(html, long), rows)[1] == ["long enough as it is, truly"]


def test_cleaning_before_duplicates_finds_more() -> None:
    rows = texts("cafÃ©", "café", "cafe\u200b", "cafe")
    assert run(steps_of("exact_duplicates", "unicode", "control"), rows)[1] == ["café", "café", "cafe", "cafe"]
    ledger, kept, gone = run(steps_of("unicode", "control", "exact_duplicates"), rows)
    assert kept == ["café", "cafe"]
    assert gone == [
        ("exact_duplicates", 2, "a.jsonl, row 1"),
        ("exact_duplicates", 4, "a.jsonl, row 3"),
    ]
    assert [(c.step, c.before, c.changed, c.after) for c in ledger.counts.values()] == [
        ("read", 4, 0, 4),
        ("unicode", 4, 1, 4),
        ("control", 4, 1, 4),
        ("exact_duplicates", 4, 0, 2),
    ]


def test_a_row_that_a_later_step_removes_still_has_duplicates() -> None:
    """As if each step had gone over all rows: the first of the three is the one that duplicates are found for."""
    rows = texts("short", "short", "quite long enough")
    _, kept, gone = run(steps_of("exact_duplicates", {"length": {"min": 10}}), rows)
    assert kept == ["quite long enough"]
    assert [step for step, _, _ in gone] == ["length", "exact_duplicates"]


def test_what_a_step_did_is_not_counted_for_rows_that_were_gone() -> None:
    ledger, _, _ = run(steps_of("exact_duplicates", "html"), texts("<b>x</b>", "<b>x</b>"))
    assert (ledger.counts[1].before, ledger.counts[1].changed) == (1, 1)


def test_every_reason_is_told() -> None:
    words = [f"word{n}" for n in range(20)]
    evaluation = Evaluation(13)
    evaluation.add("eval.jsonl", [{"q": " ".join(words)}])
    steps = steps_of(
        {"length": {"max": 40, "unit": "words"}},
        {"language": {"keep": ["en"]}},
        {"decontaminate": {"against": "eval.jsonl"}},
        {"near_duplicates": {"threshold": 0.7}},
    )
    english = "This is a perfectly ordinary sentence in the English language, about nothing much in particular, and it goes on"
    rows = [
        Bad("a.jsonl", 7, "not valid JSON", "line 7, column 3"),
        *texts(
            english,
            english + " a little",
            "Dies ist ein ganz gewöhnlicher Satz in deutscher Sprache.",
            "word " * 41,
            "Hello",
        ),
        Row({"text": english + " " + " ".join(words[2:15])}, "a.jsonl", 6),
    ]
    ledger, kept, _ = run(steps, rows, {2: evaluation})
    assert kept == [english, "Hello"]
    assert ledger.sources["a.jsonl"] == {
        "rows": 7,
        "kept": 2,
        "read: not valid JSON": 1,
        "length: more than 40 words": 1,
        "language: de": 1,
        "decontaminate: in eval.jsonl": 1,
        "near_duplicates: much like an earlier row": 1,
    }


def test_examples_are_the_first_few() -> None:
    ledger, _, _ = run(steps_of("control", {"length": {"min": 3}}), texts(*["a\x00b"] * 8))
    changed, removed = ledger.counts[0].examples, ledger.counts[1].examples
    assert len(changed) == len(removed) == EXAMPLES
    assert changed[0] == {"source": "a.jsonl", "file": "a.jsonl", "row": 1, "before": "a\x00b", "after": "ab"}
    assert removed[4]["row"] == 5


def _numbers(passages: list[Passage]) -> list[tuple[int, Any]]:
    return [(p.row.number, p.keys[0].digest()) for p in passages]


def test_processes_do_not_matter() -> None:
    """Spawned processes take other hash seeds and give the same signatures, in order; few chunks wait for them."""
    state = Steps(steps_of("near_duplicates"), {})
    rows = texts(*(f"row {n} of many, all of which say about the same" for n in range(30)))
    taken = 0

    def chunks() -> Iterator[list[tuple[str, Row | Bad]]]:
        nonlocal taken
        for start in range(0, 30, 3):
            taken += 1
            yield [("a.jsonl", row) for row in rows[start : start + 3]]

    here = [_numbers(passages) for passages in ordered(state, Steps.run_all, chunks(), 1)]
    taken = 0
    results = ordered(state, Steps.run_all, chunks(), 2)
    there = [_numbers(next(results))]
    assert taken == FEW < 10
    there += [_numbers(passages) for passages in results]
    assert here == there
    assert [number for chunk in here for number, _ in chunk] == list(range(1, 31))
