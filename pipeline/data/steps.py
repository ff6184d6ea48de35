"""A prepare stage's steps over rows: what needs one row alone runs in any process, what needs the rows before it in one place.

A row goes through all steps at once. A step that compares rows (duplicates) only takes its key there; whether the row stays
is decided later, in the rows' order, by `Ledger`, as if every step had seen all rows before the next began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.config import prepare as config
from pipeline.data import clean, markup, mask
from pipeline.data.decontaminate import Evaluation
from pipeline.data.duplicates import Exact, Near, exact_key, shingles, signature
from pipeline.data.language import UNKNOWN, language
from pipeline.data.row import Bad, Row
from pipeline.data.shards import storable
from pipeline.data.texts import NO_TEXT, change, texts, words

EXAMPLES = 5
"""Examples that a report shows of what a step changed or removed."""

WIDTH = 160
"""Characters of an example."""

READ, READING = "read", -1
"""The name and number of what comes before the first step."""


@dataclass
class Passage:
    """A row's way through the steps in one process: what it became, the numbers of those that changed it (`changed`, with
    excerpts of before and after), the keys that steps took, and the step that removed it, with the reason and details."""

    row: Row | Bad
    source: str
    changed: dict[int, tuple[str, str]] = field(default_factory=dict)
    keys: dict[int, Any] = field(default_factory=dict)
    removed: tuple[int, str, str] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The row's fields; none for one that could not be read."""
        return self.row.fields if isinstance(self.row, Row) else {}


@dataclass(frozen=True)
class Gone:
    """Why a row does not stay: `reason` is the same for all such rows of the step, `detail` what differs."""

    step: str
    reason: str
    detail: str


class Steps:
    """The steps of a recipe, ready to use in any process; `evaluations` are of those that decontaminate, by number."""

    def __init__(self, steps: list[Any], evaluations: dict[int, Evaluation]) -> None:
        self._edits: dict[int, Callable[[str], str]] = {}
        self._checks: dict[int, Callable[[dict[str, Any]], tuple[str, str] | None]] = {}
        self._keys: dict[int, Callable[[dict[str, Any]], Any]] = {}
        for number, step in enumerate(steps):
            match step:
                case config.Unicode():
                    self._edits[number] = partial(clean.unicode, form=step.form, straight_quotes=step.straight_quotes)
                case config.Control():
                    self._edits[number] = clean.control
                case config.Html():
                    self._edits[number] = markup.text_of
                case config.Whitespace():
                    self._edits[number] = partial(clean.whitespace, collapse=step.collapse, strip=step.strip)
                case config.Mask():
                    options = step.model_dump(exclude={"step"})
                    self._edits[number] = partial(mask.mask, **options)
                case config.Length():
                    self._checks[number] = partial(_length, step)
                case config.Language():
                    self._checks[number] = partial(_language, step)
                case config.Decontaminate():
                    self._checks[number] = partial(_contaminated, step, evaluations[number])
                case config.ExactDuplicates():
                    self._keys[number] = exact_key
                case config.NearDuplicates():
                    self._keys[number] = partial(_signature, step)
        self._count = len(steps)

    def run(self, row: Row, source: str) -> Passage:
        """Take a row through the steps until one removes it."""
        passage, fields = Passage(row, source), row.fields
        for number in range(self._count):
            if number in self._edits:
                before, fields = fields, change(fields, self._edits[number])
                if fields is not before:
                    passage.changed[number] = _difference(before, fields)
            elif number in self._checks:
                if found := self._checks[number](fields):
                    passage.removed = (number, *found)
                    break
            else:
                passage.keys[number] = self._keys[number](fields)
        passage.row = Row(storable(fields), row.file, row.number)
        return passage

    def run_all(self, rows: Iterable[tuple[str, Row | Bad]]) -> list[Passage]:
        """`run` for (source, row) pairs; a row that could not be read comes out removed. Excerpts are kept of the first
        changes only, more than a report needs."""
        shown: Counter[int] = Counter()
        passages = []
        for source, row in rows:
            if isinstance(row, Bad):
                passages.append(Passage(row, source, removed=(READING, row.reason, row.detail)))
                continue
            if not texts(row.fields):
                found = "its columns: " + ", ".join(sorted(row.fields))
                passages.append(Passage(row, source, removed=(READING, NO_TEXT, found)))
                continue
            passage = self.run(row, source)
            for number in passage.changed:
                shown[number] += 1
                if shown[number] > 2 * EXAMPLES:
                    passage.changed[number] = ("", "")
            passages.append(passage)
        return passages


def _length(step: config.Length, fields: dict[str, Any]) -> tuple[str, str] | None:
    count = len if step.unit == "characters" else lambda text: len(words(text))
    size = sum(count(text) for text in texts(fields))
    if size < step.min:
        return f"fewer than {step.min} {step.unit}", f"{size} {step.unit}"
    if step.max is not None and size > step.max:
        return f"more than {step.max} {step.unit}", f"{size} {step.unit}"
    return None


def _language(step: config.Language, fields: dict[str, Any]) -> tuple[str, str] | None:
    code, confidence = language("\n".join(texts(fields)))
    if code == UNKNOWN:
        return (UNKNOWN, "too short to tell") if step.unknown == "drop" else None
    if code not in step.keep:
        return code, f"confidence {confidence:.2f}"
    if confidence < step.min_confidence:
        return f"{code}, not sure enough", f"confidence {confidence:.2f}"
    return None


def _contaminated(step: config.Decontaminate, against: Evaluation, fields: dict[str, Any]) -> tuple[str, str] | None:
    hit = against.search(fields)
    if hit is None or hit.share < step.min_overlap:
        return None
    return f"in {hit.file}", f"{hit.share:.0%} of its n-grams, first: {hit.gram}"


def _signature(step: config.NearDuplicates, fields: dict[str, Any]) -> Any:
    return signature(shingles(fields, step.ngram), step.num_perm)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, str]:
    """The first text that differs, before and after, from a little ahead of the difference."""
    for old, new in zip(texts(before), texts(after), strict=True):
        if old != new:
            place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            start = max(0, place - WIDTH // 4)
            return old[start : start + WIDTH], new[start : start + WIDTH]
    return "", ""


@dataclass
class Count:
    """What a step did: rows that came to it, rows it changed, rows it removed by reason, and examples of both."""

    step: str
    before: int = 0
    changed: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def after(self) -> int:
        return self.before - self.removed.total()


class Ledger:
    """Decides, in the rows' order, which stay, and counts every row once: as kept, or under the step that removed it.

    `counts` are those of reading and of each step, `sources` say per source where its rows went.
    """

    def __init__(self, steps: list[Any]) -> None:
        self.counts = {READING: Count(READ), **{n: Count(step.step) for n, step in enumerate(steps)}}
        self.sources: dict[str, Counter[str]] = {}
        self.kept = 0
        self._indexes: dict[int, tuple[Exact | Near, str]] = {}
        for number, step in enumerate(steps):
            if isinstance(step, config.ExactDuplicates):
                self._indexes[number] = (Exact(), "same text as an earlier row")
            elif isinstance(step, config.NearDuplicates):
                self._indexes[number] = (Near(step.threshold, step.num_perm), "much like an earlier row")

    def enter(self, passage: Passage) -> Gone | None:
        """Count a row; None when it stays, else why it does not."""
        source = self.sources.setdefault(passage.source, Counter())
        source["rows"] += 1
        for number, count in self.counts.items():
            count.before += 1
            if number in passage.changed:
                count.changed += 1
                _show_change(count, passage, *passage.changed[number])
            if removed := self._removed(passage, number):
                reason, detail = removed
                count.removed[reason] += 1
                source[f"{count.step}: {reason}"] += 1
                if len(count.examples) < EXAMPLES:
                    text = "\n".join(texts(passage.fields))
                    count.examples.append({**_place(passage), "reason": reason, "detail": detail, "text": text[:WIDTH]})
                return Gone(count.step, reason, detail)
        source["kept"] += 1
        self.kept += 1
        return None

    def _removed(self, passage: Passage, number: int) -> tuple[str, str] | None:
        if passage.removed and passage.removed[0] == number:
            return passage.removed[1:]
        if number in passage.keys:
            index, reason = self._indexes[number]
            earlier = index.first(passage.keys[number], f"{passage.row.file}, row {passage.row.number}")
            return (reason, earlier) if earlier is not None else None
        return None


def _show_change(count: Count, passage: Passage, before: str, after: str) -> None:
    if len(count.examples) < EXAMPLES and before != after:
        count.examples.append({**_place(passage), "before": before, "after": after})


def _place(passage: Passage) -> dict[str, Any]:
    return {"source": passage.source, "file": passage.row.file, "row": passage.row.number}
