"""Which rows are bad, where they are listed, and when there are too many of them. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from pipeline.data.row import Bad, Row
from pipeline.data.shape import SHAPES, UNRECOGNISED, Example, Skip
from pipeline.errors import UserError

NAME = "rejected.jsonl"
LOOKED_AT = 100
"""When none of so many first rows of a source has a shape that is recognised, reading stops."""
SHOWN = 200
"""Characters of a rejected row that its entry quotes."""
REPEATED = "an id that an earlier row has"


class Rejections:
    """Counts the rows of each source that are not used, by reason, and lists the bad ones in a file.

    Each line of the file is an object: `source`, `file`, `row` (its number), `reason`, `detail` where there is one, and the
    first characters of the `content`. It is written under another name and takes its own in `close`, so that a reader sees a
    whole list or none: a stop by too many bad rows closes it first, and another error throws it away. `path` None: rows are
    counted and not listed.

    With `on_bad_row: stop` the first bad row raises UserError. Otherwise `finish`, once a source is read, raises when more
    than `most` of its rows are bad: not earlier, since bad rows often stand together. Rows that are merely too long are
    listed, and do not count towards that share.
    """

    def __init__(
        self, path: Path | None = None, on_bad_row: Literal["stop", "reject"] = "reject", most: float = 0.05
    ) -> None:
        self.path, self.on_bad_row, self.most = path, on_bad_row, most
        self.rows: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}
        self.bad: dict[str, Counter[str]] = {}
        self.first: dict[str, str] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Rejections:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, UserError):
            self.close()
        elif self._file is not None and self.path is not None:
            self._file.close()
            _unfinished(self.path).unlink()

    def count(self, source: str, rows: int = 1) -> None:
        """Count rows of a source that were read, whatever becomes of them."""
        self.rows[source] += rows

    def add(
        self,
        source: str,
        row: Row | Bad,
        reason: str,
        *,
        detail: str = "",
        bad: bool = True,
        listed: bool = True,
    ) -> None:
        """Count a row under `reason` and list it. `bad` False: it is not at fault (too long); `listed` False: it is only
        counted (another stage's)."""
        self.reasons.setdefault(source, Counter())[reason] += 1
        if listed:
            self._list(source, row, reason, detail)
        if not bad:
            return
        self.bad.setdefault(source, Counter())[reason] += 1
        self.first.setdefault(source, f"{row.where}: {reason}" + (f" ({detail})" if detail else ""))
        if self.on_bad_row == "stop":
            self._stop(f"data {row.where}", reason + (f" ({detail})" if detail else ""), "on_bad_row: reject")

    def finish(self, source: str) -> None:
        """A source has been read whole. Raises UserError when it holds no row, or too many are bad."""
        rows, bad = self.rows[source], self.bad.get(source, Counter())
        if not rows:
            self._stop(f"data {source}", "it holds no row", "")
        if bad[UNRECOGNISED] == rows:
            self.unrecognised(source, [])
        if bad.total() > self.most * rows:
            worst = ", ".join(f"{reason} ({count})" for reason, count in bad.most_common(3))
            self._stop(
                f"data {source}",
                f"{bad.total()} of {rows} rows are bad, above {self.most:.3g} of all: {worst}. "
                f"The first: {self.first[source]}",
                "a higher max_bad",
            )

    def unrecognised(self, source: str, columns: Iterable[str]) -> None:
        """Raise UserError: nothing in the source looks like training data."""
        found = ", ".join(sorted(columns))
        self.close()
        raise UserError(
            f"data {source}",
            f"no row has a shape that is recognised; {'its columns are ' + found if found else self.first[source]}",
            expected=f"one of: {SHAPES}",
            fix="rename the columns",
        )

    def close(self) -> None:
        """Give the list its name, on the disk before; nothing when no row was listed."""
        if self._file is None or self.path is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(_unfinished(self.path), self.path)

    def _list(self, source: str, row: Row | Bad, reason: str, detail: str) -> None:
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Lone surrogates of a Parquet file cannot be written as they are.
            self._file = _unfinished(self.path).open("w", encoding="utf-8", errors="backslashreplace")
        entry = {"source": source, "file": row.file, "row": row.number, "reason": reason}
        if detail:
            entry["detail"] = detail
        if isinstance(row, Row):
            entry["content"] = _begin(row.fields)
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _stop(self, where: str, found: str, instead: str) -> None:
        listed = self._file is not None
        self.close()
        raise UserError(
            where,
            found + (f". All are listed in {self.path}" if listed else ""),
            fix="mend or remove the rows" + (f", or set {instead} under `data:`" if instead else "") if instead else "",
        )


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".writing")


def _begin(fields: dict[str, Any]) -> str:
    """The first characters of a row, without writing out a long one."""
    parts, room = [], SHOWN
    for name, value in fields.items():
        text = value[:room] if isinstance(value, str) else repr(value)[:room]
        parts.append(f"{name}: {text}")
        room -= len(parts[-1])
        if room <= 0:
            break
    return "; ".join(parts)[:SHOWN]


class Checked:
    """A reader that also refuses what can be seen only beside other rows: an `id` that an earlier row of the source has, and
    messages in a file whose first good row is plain text, or the reverse, which a chat template would set apart."""

    def __init__(self, read: Callable[[Row], Example]) -> None:
        self.read = read
        self.ids = _Ids()
        self.forms: dict[str, bool] = {}

    def __call__(self, row: Row) -> Example:
        """Raises Skip, as the reader does."""
        example = self.read(row)
        plain = isinstance(example.prompt, str)
        if self.forms.setdefault(row.file, plain) != plain:
            raise Skip("plain text in a file of messages" if plain else "messages in a file of plain text")
        name = row.fields.get("id")
        if name is not None and name != "" and not self.ids.new(name):
            raise Skip(REPEATED)
        return example


class _Ids:
    """Which ids were seen, by 8-byte hashes in an open-addressed table: 16 to 32 bytes an id.

    That two of 10 million ids share a hash has a probability of 3 in a million.
    """

    def __init__(self) -> None:
        self.table = array("Q", bytes(8 * 1024))
        self.used = 0

    def new(self, value: Any) -> bool:
        """Remember `value`; whether it was not there before."""
        text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1  # 0 marks a free place
        if not self._put(self.table, key):
            return False
        self.used += 1
        if 2 * self.used > len(self.table):
            larger = array("Q", bytes(16 * len(self.table)))
            for old in self.table:
                if old:
                    self._put(larger, old)
            self.table = larger
        return True

    @staticmethod
    def _put(table: array[int], key: int) -> bool:
        mask = len(table) - 1
        place = key & mask
        while table[place]:
            if table[place] == key:
                return False
            place = (place + 1) & mask
        table[place] = key
        return True


def examples(
    source: str, rows: Iterable[Row | Bad], read: Callable[[Row], Example], rejections: Rejections
) -> Iterator[tuple[Row, Example]]:
    """The rows of a source that can be used, each with its example; the others go to `rejections`.

    Raises UserError when there are too many bad ones, and early when none of the first LOOKED_AT rows has a known shape.
    """
    checked = Checked(read)
    columns: set[str] = set()
    for number, row in enumerate(rows, 1):
        rejections.count(source)
        if isinstance(row, Bad):
            rejections.add(source, row, row.reason, detail=row.detail)
            continue
        try:
            example = checked(row)
        except Skip as skip:
            if number <= LOOKED_AT:
                columns |= row.fields.keys()
            rejections.add(source, row, str(skip), bad=skip.bad, listed=skip.bad)
            if number == LOOKED_AT == rejections.bad.get(source, Counter())[UNRECOGNISED]:
                rejections.unrecognised(source, columns)
            continue
        yield row, example
    if columns and rejections.bad.get(source, Counter())[UNRECOGNISED] == rejections.rows[source]:
        rejections.unrecognised(source, columns)
    rejections.finish(source)
