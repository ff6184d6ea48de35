"""CSV and TSV to rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.data import lines
from pipeline.data.lines import LOST, too_long
from pipeline.data.row import Bad, Row
from pipeline.errors import UserError


class _Feed:
    """Lines for the csv module, as text. `fault` and `detail`: what is wrong with a line since they were last cleared."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self.lines = lines.lines(stream, start)
        self.fault = self.detail = ""
        self.ended = False
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.number = line.number
        if line.data is None:
            self.fault, self.detail = too_long("", line.number).reason, f"line {line.number}"
            return '"\n' if line.open else "\n"  # opens or closes the quotation as the unread line did
        try:
            text = line.data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault, self.detail = "not UTF-8", f"byte {line.start + error.start}"
            text = line.data.decode("utf-8", "replace")
        if "\0" in text:
            self.fault, self.detail = "a NUL byte", f"line {line.number}"
            text = text.replace("\0", "")
        return text


def csv_rows(stream: BinaryIO, name: str, delimiter: str, start: int = 0) -> Iterator[Row | Bad]:
    """Rows of CSV or TSV with a header, quoted as RFC 4180 has it and as spreadsheets and pandas write both."""
    csv.field_size_limit(lines.LIMIT)  # the module's default is 128 KiB, less than a long document
    feed = _Feed(stream, start)
    records = csv.reader(feed, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        feed.fault = feed.detail = ""
        begins = feed.number + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            lost = feed.ended or "field larger than" in str(error)
            if lost and header is not None:
                yield Bad(name, number + 1, LOST + ": a quotation is not closed", f"it opens in line {begins} or after")
                return
            cells, feed.fault, feed.detail = [], feed.fault or "not valid CSV", f"line {begins}: {error}"
        if not cells and not feed.fault:
            continue  # a blank line
        if header is None:
            header = _header(cells, name, feed)
            continue
        number += 1
        if feed.fault:
            yield Bad(name, number, feed.fault, feed.detail)
        elif len(cells) != len(header):
            yield Bad(name, number, "not one cell for each column", f"{len(cells)} cells, {len(header)} columns")
        else:
            yield Row(dict(zip(header, cells, strict=True)), name, number)


def _header(cells: list[str], name: str, feed: _Feed) -> list[str]:
    fault = f"{feed.fault} ({feed.detail})" if feed.fault else ""
    if not fault and len(set(cells)) != len(cells):
        fault = f"column {next(cell for cell in cells if cells.count(cell) > 1)!r} is there twice"
    if fault:
        raise UserError(
            f"data {name}, header", fault, expected="the columns' names, each once", fix="mend the first line"
        )
    return cells
