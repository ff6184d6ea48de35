"""Text files to rows, in bounded memory: JSONL, JSON lists, CSV and TSV, plain or compressed by gzip or Zstandard.

A row that cannot be read is a `Bad` with its place, and reading goes on after it. What breaks a whole file (it is not there,
it is not gzip, it is UTF-16) raises UserError. A file that breaks midway gives its rows up to there and one `Bad` for the rest.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.columnar import arrow_rows, parquet_rows
from pipeline.data.row import Bad, Row, kind
from pipeline.errors import UserError

LIMIT = 64 * 2**20
"""Bytes of the longest line, JSON element or CSV cell that is read. A longer one is a bad row, and passed over unread."""

TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
CHUNK = 2**20
"""Bytes that are read at a time where there are no lines to go by."""

SUFFIXES = (*(kind + packed for kind in TEXT for packed in ("", ".gz", ".zst")), ".parquet", ".arrow")
INVALID = "not valid JSON"
LOST = "the file cannot be read from here on"
BOM = b"\xef\xbb\xbf"


def file_rows(file: Path) -> Iterator[Row | Bad]:
    """Every row of one file, by its suffix. Raises UserError for a file of which no row can be read."""
    name, number = str(file), 0
    read = _reader(file)
    try:
        for row in read:
            yield row
            number = row.number
    except (OSError, EOFError, zlib.error) as error:
        # Only a fault of the disk has an errno; the others are faults of what is in the file, as far as it was read.
        if number == 0 or getattr(error, "errno", None) is not None:
            raise UserError(f"data {name}", f"cannot be read: {error}", fix="replace or re-download the file") from None
        yield Bad(name, number + 1, LOST, str(error))


def _reader(file: Path) -> Iterator[Row | Bad]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        return parquet_rows(file)
    if name.endswith(".arrow"):
        return arrow_rows(file)
    if not name.endswith(SUFFIXES):
        raise UserError(
            f"data {file}",
            f"no format is known by the suffix {file.suffix or 'of a name without one'}",
            expected="a file ending in " + ", ".join(SUFFIXES),
            fix="rename or convert the file",
        )
    return _text_rows(file, name.removesuffix(".gz").removesuffix(".zst"))


def _text_rows(file: Path, name: str) -> Iterator[Row | Bad]:
    with _opened(file) as stream:
        head = stream.peek(4)  # type: ignore[attr-defined]
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                f"data {file}", "UTF-16 text", expected="UTF-8", fix=f"iconv -f UTF-16 -t UTF-8 {file} > NEW FILE"
            )
        start = len(stream.read(3)) if head[:3] == BOM else 0  # Excel writes a byte-order mark
        if name.endswith((".csv", ".tsv")):
            yield from csv_rows(stream, str(file), "\t" if name.endswith(".tsv") else ",", start)
        elif name.endswith(".json") and stream.peek(2**16).lstrip()[:1] != b"{":  # type: ignore[attr-defined]
            yield from list_rows(stream, str(file), start)
        elif name.endswith(".json"):
            yield from _object_lines(stream, str(file), start)
        else:
            yield from line_rows(stream, str(file), start)


def _opened(file: Path) -> BinaryIO:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.name.lower().endswith(".zst"):
        import pyarrow

        # Not the zstandard package: its reader takes a frame that is cut off for one that has ended.
        raw = pyarrow.input_stream(str(file), compression="zstd")
        return io.BufferedReader(raw, 2**16)
    return file.open("rb")


# ---------------------------------------------------------------- lines


@dataclass(slots=True)
class _Line:
    """A line: `start` is its first byte's place in the (unpacked) file; `data` is None above LIMIT bytes; `open` tells
    whether the passed-over line holds an odd number of quotation marks."""

    number: int
    start: int
    data: bytes | None
    open: bool = False


def _lines(stream: BinaryIO, start: int) -> Iterator[_Line]:
    """Lines ended by line feeds alone: JSON strings may hold U+2028 and other characters that text files split at."""
    number, limit = 0, LIMIT
    while data := stream.readline(limit + 1):
        number += 1
        size, begin = len(data), start
        if size > limit and not data.endswith(b"\n"):
            quotes = data.count(b'"')
            del data
            while piece := stream.readline(CHUNK):
                size += len(piece)
                quotes += piece.count(b'"')
                if piece.endswith(b"\n"):
                    break
            yield _Line(number, begin, None, quotes % 2 == 1)
        else:
            yield _Line(number, begin, data)
        start += size


def line_rows(stream: BinaryIO, name: str, start: int = 0) -> Iterator[Row | Bad]:
    """Rows of JSONL: one JSON object a line. Blank lines are no rows."""
    for line in _lines(stream, start):
        if line.data is None:
            yield _too_long(name, line.number)
        elif line.data.strip():
            yield _json_row(line.data, name, line.number, line.start)


def _object_lines(stream: BinaryIO, name: str, start: int) -> Iterator[Row | Bad]:
    """Rows of a `.json` that begins with an object: JSONL by another name, unless that object goes over many lines."""
    for number, row in enumerate(line_rows(stream, name, start)):
        if number == 0 and isinstance(row, Bad) and row.reason == INVALID:
            raise UserError(
                f"data {name}",
                f"its first line is no JSON object of its own: {row.detail}",
                expected="a JSON list of objects, or one JSON object a line",
                fix="write the rows as a list",
            )
        yield row


def _too_long(name: str, number: int) -> Bad:
    return Bad(name, number, f"longer than {LIMIT / 2**20:g} MiB")


# ---------------------------------------------------------------- JSON


class _Unsound(ValueError):
    """JSON that a parser takes and that we do not."""


def _json_row(data: bytes, name: str, number: int, start: int) -> Row | Bad:
    """One JSON text as a row. A bare string is a row whose `text` it is.

    Refused beside what is not JSON: an object that has a key twice, for it is not known which is meant, and half of a
    surrogate pair, which no tokenizer takes. NaN and Infinity are taken as Python writes them.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(name, number, "not UTF-8", f"byte {start + error.start}")
    except UnicodeEncodeError:
        return Bad(name, number, "half of a surrogate pair")
    except _Unsound as error:
        return Bad(name, number, "an object has a key twice", str(error))
    except (json.JSONDecodeError, RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        return Bad(name, number, INVALID, str(error))
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return Bad(name, number, f"{kind(value)}, not a JSON object")
    return Row(value, name, number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Unsound(next(name for name in names if names.count(name) > 1))
    return fields


_MARK = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'\\.|"', re.DOTALL)


def list_rows(stream: BinaryIO, name: str, start: int = 0) -> Iterator[Row | Bad]:
    """Rows of a file that is one JSON list, an element at a time.

    Elements are told apart by brackets, quotation marks and commas before any is parsed (an incremental JSON parser would
    stop at the first fault), so that a bad element is one bad row and the next is read.
    """
    number = 0
    for number, (begin, element, fault) in enumerate(_elements(stream, name, start), 1):
        if element is None:
            yield Bad(name, number, fault) if fault != "long" else _too_long(name, number)
        else:
            yield _json_row(bytes(element), name, number, begin)


def _elements(stream: BinaryIO, name: str, start: int) -> Iterator[tuple[int, bytearray | None, str]]:
    """(first byte's place, bytes, fault) of every element; the bytes are None where `fault` says why."""
    head = b""
    while not head.strip():
        head = stream.read(CHUNK)
        if not head:
            return  # nothing but white space
    buffer = bytearray(head.lstrip())
    start += len(head) - len(buffer)
    if buffer[:1] != b"[":
        raise UserError(
            f"data {name}",
            f"it begins with {bytes(buffer[:10])!r}",
            expected="a JSON list of objects, or one JSON object a line",
        )
    del buffer[:1]
    start += 1
    depth, place, quoted, long, first, ended = 0, 0, False, False, True, False
    while not ended:
        found = (_IN_STRING if quoted else _MARK).search(buffer, place)
        if found is None:
            # A backslash that ends the buffer belongs to the byte that comes next.
            place = len(buffer) - (quoted and place < len(buffer) and buffer.endswith(b"\\"))
            if len(buffer) > LIMIT:
                long = True
            if long:
                start += place
                del buffer[:place]
                place = 0
            piece = stream.read(CHUNK)
            if not piece:
                yield start, None, LOST + ": the list is not closed"
                return
            buffer += piece
            continue
        place, mark = found.end(), found[0]
        if quoted:
            quoted = mark != b'"'
        elif mark == b'"':
            quoted = True
        elif mark in b"[{":
            depth += 1
        elif depth and mark in b"]}":
            depth -= 1
        elif depth == 0 and mark in b",]":
            element = buffer[: found.start()]
            ended = mark == b"]"
            if long:
                yield start, None, "long"
            elif element.strip() or not (first and ended):
                yield start, element, ""
            del buffer[:place]
            start, place, long, first = start + place, 0, False, False
    while buffer or (buffer := bytearray(stream.read(CHUNK))):
        if buffer.strip():
            yield start, None, "text after the end of the list"
            return
        buffer.clear()


# ---------------------------------------------------------------- CSV


class _Feed:
    """Lines for the csv module, as text. `fault` and `detail`: what is wrong with a line since they were last cleared."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self.lines = _lines(stream, start)
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
            self.fault, self.detail = f"longer than {LIMIT / 2**20:g} MiB", f"line {line.number}"
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
    csv.field_size_limit(LIMIT)  # the module's default is 128 KiB, less than a long document
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
