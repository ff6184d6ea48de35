"""Lines of a text file, in bounded memory whatever their length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.data.row import Bad

LIMIT = 64 * 2**20
"""Bytes of the longest line, JSON element or CSV cell that is read. A longer one is a bad row, and passed over unread."""
CHUNK = 2**20
"""Bytes that are read at a time where there are no lines to go by."""
LOST = "the file cannot be read from here on"


@dataclass(slots=True)
class Line:
    """A line: `start` is its first byte's place in the (unpacked) file; `data` is None above LIMIT bytes; `open` tells
    whether the passed-over line holds an odd number of quotation marks."""

    number: int
    start: int
    data: bytes | None
    open: bool = False


def lines(stream: BinaryIO, start: int) -> Iterator[Line]:
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
            yield Line(number, begin, None, quotes % 2 == 1)
        else:
            yield Line(number, begin, data)
        start += size


def too_long(name: str, number: int) -> Bad:
    return Bad(name, number, f"longer than {LIMIT / 2**20:g} MiB")
