"""What models said of rows, kept on disk: nothing is measured twice, and a stage that was interrupted goes on.

It lies in `<run>/.scores/<key>.jsonl`, a line for every few batches. The key is a hash of everything that decides the
numbers: the models' contents and precision, the rows, how they are read and in which batches. Batches are cut before ranks
come in, so that the numbers are the same on any number of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline import engine
from pipeline.config.recipe import digest
from pipeline.errors import Trouble
from pipeline.stage import Context, Stopped

FORMAT = 1
"""Raised when the same key stands for other numbers than before."""

SCORES = ".scores"
BATCHES = 16
"""Batches between one save and the next."""


def measure(
    context: Context, key: dict[str, Any], lengths: Sequence[int], size: int, read: Callable[[list[int]], list[Any]]
) -> list[Any]:
    """What `read` says of each row, a JSON value for each, in order, on every rank. Collective.

    `lengths` are the rows' tokens; rows of like length go together, `size` at a time. `read` is given rows' numbers and runs
    on one rank. `key` says what `read` depends on. Raises Stopped, with all that was read kept, when the stage is asked to
    stop, and what `read` raises of Trouble, with what was read before kept.
    """
    ordered = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    file = context.run_dir / SCORES / f"{digest({**key, 'size': size, 'format': FORMAT})}.jsonl"
    said: list[list[Any]] = engine.on_main(lambda: _kept(file))
    while len(said) < len(batches):
        numbers = range(len(said), min(len(said) + BATCHES, len(batches)))
        mine = {number: batches[number] for number in numbers[context.rank :: context.world_size]}
        found = _together(mine, read)
        fresh = [found[number] for number in numbers]
        engine.on_main(lambda fresh=fresh: _keep(file, fresh))  # type: ignore[misc]
        said += fresh
        if context.stop_requested() and len(said) < len(batches):
            raise Stopped
    answers: dict[int, Any] = {}
    for rows, values in zip(batches, said, strict=True):
        answers |= dict(zip(rows, values, strict=True))
    return [answers[row] for row in range(len(lengths))]


def _together(mine: dict[int, list[int]], read: Callable[[list[int]], list[Any]]) -> dict[int, list[Any]]:
    """What is said of all ranks' batches. Trouble on one rank is raised on all."""
    found: dict[int, list[Any]] = {}
    trouble: Trouble | None = None
    try:
        found = {number: read(rows) for number, rows in mine.items()}
    except Trouble as raised:
        trouble = raised
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (found, trouble))
    for _, raised_there in parts:
        if raised_there is not None:
            raise raised_there
    return {number: values for part, _ in parts for number, values in part.items()}


def _kept(file: Path) -> list[list[Any]]:
    """The batches of a file, in order, up to a line that was not written whole."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    if lines[-1]:
        file.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    return [batch for line in lines[:-1] for batch in json.loads(line)]


def _keep(file: Path, batches: list[list[Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("ab") as out:
        out.write(json.dumps(batches).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
