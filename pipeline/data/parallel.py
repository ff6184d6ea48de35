"""A function over a stream in several processes: results in the stream's order, and only a few chunks in flight. Torch-free."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
State = TypeVar("State")
AHEAD = 2
"""Items in flight for each process: one that is worked on and one that waits."""

FEW = 8
"""Fewer items are done here: starting processes would take longer than they save."""

_state: Any = None


def ordered(
    state: State,
    use: Callable[[State, Item], Result],
    items: Iterable[Item],
    workers: int,
    start: Literal["spawn", "fork"] = "spawn",
) -> Iterator[Result]:
    """`use(state, item)` for every item, in order; in this process if there is one worker.

    `state` goes to each process once; it and `use` must be picklable unless processes are forked. At most AHEAD x workers
    items, or FEW, are taken from `items` before their results are.

    A forked process starts at once and has what this one imported, but not its threads, whose locks it has as they were:
    `use` must leave Arrow and torch alone there.
    """
    items = iter(items)
    first = list(islice(items, FEW)) if workers > 1 else []
    if len(first) < FEW:
        for item in chain(first, items):
            yield use(state, item)
        return
    context = multiprocessing.get_context(start)
    waiting: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, context, _begin, (state, os.getpid()))
    try:
        for item in chain(first, items):
            waiting.append(pool.submit(_call, use, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(state: Any, parent: int) -> None:
    global _state
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a killed stage
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the stage's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the stage's handler, which would keep it alive
    _state = state


def _call(use: Callable[[Any, Any], Any], item: Any) -> Any:
    return use(_state, item)
