"""One file to its rows, by its suffix: text, plain or compressed by gzip or Zstandard, Parquet and Arrow.

A row that cannot be read is a `Bad` with its place, and reading goes on after it. What breaks a whole file (it is not there,
it is not gzip, it is UTF-16) raises UserError. A file that breaks midway gives its rows up to there and one `Bad` for the rest.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.data.columnar import arrow_rows, parquet_rows
from pipeline.data.delimited import csv_rows
from pipeline.data.json_rows import line_rows, list_rows, object_lines
from pipeline.data.lines import LIMIT, LOST, too_long
from pipeline.data.row import Bad, Row
from pipeline.errors import UserError

TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
DOCUMENTS = (".txt", ".txt.gz", ".txt.zst")
"""Files that are one row."""
SUFFIXES = (*(kind + packed for kind in TEXT for packed in ("", ".gz", ".zst")), ".parquet", ".arrow")
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
        elif name.endswith(".txt"):
            yield document(stream, str(file), start)
        elif name.endswith(".json") and stream.peek(2**16).lstrip()[:1] != b"{":  # type: ignore[attr-defined]
            yield from list_rows(stream, str(file), start)
        elif name.endswith(".json"):
            yield from object_lines(stream, str(file), start)
        else:
            yield from line_rows(stream, str(file), start)


def document(stream: BinaryIO, name: str, start: int) -> Row | Bad:
    """A file that is one text."""
    data = stream.read(LIMIT + 1)
    if len(data) > LIMIT:
        return too_long(name, 1)
    try:
        return Row({"text": data.decode("utf-8")}, name, 1)
    except UnicodeDecodeError as error:
        return Bad(name, 1, "not UTF-8", f"byte {start + error.start}")


def _opened(file: Path) -> BinaryIO:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.name.lower().endswith(".zst"):
        import pyarrow

        # Not the zstandard package: its reader takes a frame that is cut off for one that has ended.
        raw = pyarrow.input_stream(str(file), compression="zstd")
        return io.BufferedReader(raw, 2**16)
    return file.open("rb")
