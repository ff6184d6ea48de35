"""Examples to rows of token ids, in order, by several processes when there are many."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from pipeline.data.parallel import ordered
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
    processes = len(os.sched_getaffinity(0)) if len(few) == FEW else 1
    taken: deque[list[Placed]] = deque()

    def chunks() -> Iterator[list[Example | None]]:
        every = chain(few, stream)
        while chunk := list(islice(every, CHUNK)):
            taken.append(chunk)
            yield [row.example for row in chunk]

    # Forked: a process that starts anew would import the whole stage, for longer than most data takes.
    for made in ordered(make, _chunk, chunks(), processes, start="fork"):
        yield from zip(taken.popleft(), made, strict=True)


def _chunk(make: Encode, examples: list[Example | None]) -> list[Row | str]:
    """What each example is as token ids, or why it cannot be; nothing for none."""
    made: list[Row | str] = []
    for example in examples:
        try:
            made.append(make(example) if example is not None else {})
        except Skip as reason:
            made.append(str(reason))
    return made
