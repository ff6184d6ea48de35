"""JSON to rows: one object a line, or the elements of a list, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.data import lines
from pipeline.data.lines import LOST, too_long
from pipeline.data.row import Bad, Row, kind
from pipeline.errors import UserError

INVALID = "not valid JSON"


def line_rows(stream: BinaryIO, name: str, start: int = 0) -> Iterator[Row | Bad]:
    """Rows of JSONL: one JSON object a line. Blank lines are no rows."""
    for line in lines.lines(stream, start):
        if line.data is None:
            yield too_long(name, line.number)
        elif line.data.strip():
            yield _json_row(line.data, name, line.number, line.start)


def object_lines(stream: BinaryIO, name: str, start: int) -> Iterator[Row | Bad]:
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
            yield Bad(name, number, fault) if fault != "long" else too_long(name, number)
        else:
            yield _json_row(bytes(element), name, number, begin)


def _elements(stream: BinaryIO, name: str, start: int) -> Iterator[tuple[int, bytearray | None, str]]:
    """(first byte's place, bytes, fault) of every element; the bytes are None where `fault` says why."""
    head = b""
    while not head.strip():
        head = stream.read(lines.CHUNK)
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
            if len(buffer) > lines.LIMIT:
                long = True
            if long:
                start += place
                del buffer[:place]
                place = 0
            piece = stream.read(lines.CHUNK)
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
    while buffer or (buffer := bytearray(stream.read(lines.CHUNK))):
        if buffer.strip():
            yield start, None, "text after the end of the list"
            return
        buffer.clear()
