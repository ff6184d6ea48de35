"""Examples to rows of token ids, in order, by several processes when there are many."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import get_context
from typing import Any

from pipeline.data.shape import Example, Skip
from pipeline.data.split import Placed

CHUNK = 256
FEW = 16 * CHUNK
"""Up to so many rows, starting other processes would take longer than it saves."""

Row = dict[str, Any]
Encode = Callable[[Example], Row]


def encoded(rows: Iterable[Placed], make: Encode) -> Iterator[tuple[Placed, Row | str]]:
    """Each row with its encoding, or with why it has none; in order. Many rows are encoded by several processes."""
    stream = iter(rows)
    few = list(islice(stream, FEW))
    yield from zip(few, _chunk([row.example for row in few], make), strict=True)
    if len(few) == FEW:
        yield from _by_processes(stream, make, len(os.sched_getaffinity(0)))


def _by_processes(stream: Iterator[Placed], make: Encode, processes: int) -> Iterator[tuple[Placed, Row | str]]:
    """At most two chunks for each process are read ahead."""
    waiting: deque[tuple[list[Placed], Any]] = deque()
    with get_context("fork").Pool(processes, _remember, (make,)) as pool:
        while chunk := list(islice(stream, CHUNK)):
            waiting.append((chunk, pool.apply_async(_remembered, ([row.example for row in chunk],))))
            if len(waiting) > 2 * processes:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())


def _finished(chunk: list[Placed], result: Any) -> Iterator[tuple[Placed, Row | str]]:
    return zip(chunk, result.get(), strict=True)


def _chunk(examples: list[Example | None], make: Encode) -> list[Row | str]:
    """What each example is as token ids, or why it cannot be; nothing for none."""
    made: list[Row | str] = []
    for example in examples:
        try:
            made.append(make(example) if example is not None else {})
        except Skip as reason:
            made.append(str(reason))
    return made


_make: Encode
"""What this process encodes with; set where it starts, since a closure cannot be sent to it."""


def _remember(make: Encode) -> None:
    global _make
    _make = make


def _remembered(examples: list[Example | None]) -> list[Row | str]:
    return _chunk(examples, _make)
