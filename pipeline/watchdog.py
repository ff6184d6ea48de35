"""A rank that hangs ends the job within a stated time, and says where it hung; ranks that waited for it say only that.

From joining the other ranks on, the main thread reports progress at every step, micro-batch and decoded token. After
`deepspeed.timeout` seconds without any, a second thread tells where the main one is and ends the process, whereupon the
launcher ends the others. Work of rank 0 alone takes as long as it takes.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil

WAITING = (("torch", "distributed"), ("deepspeed", "comm"), ("deepspeed", "runtime"))
"""Packages whose code a rank is in while it waits for the others."""

PATIENCE = 5.0
"""Seconds for which a rank with nothing of its own to tell leaves the word to the one at fault."""

_last = math.inf


def rest() -> None:
    """What comes is not limited, until the next `progress`."""
    global _last
    _last = math.inf


def progress() -> None:
    """The main thread goes on."""
    global _last
    _last = time.monotonic()


@contextmanager
def watchdog(seconds: float, rank: int, world_size: int) -> Iterator[None]:
    """End this process when its main thread, inside, makes no progress for `seconds` after it has made some."""
    rest()
    ended, main = threading.Event(), threading.get_ident()
    arguments = (seconds, f"rank {rank} of {world_size}", main, ended)
    threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(seconds: float, me: str, main: int, ended: threading.Event) -> None:
    while (left := _last + seconds - time.monotonic()) > 0:
        if ended.wait(min(left, 1.0)):
            return
    faulthandler.dump_traceback_later(4 * PATIENCE, exit=True)  # should this thread be kept from telling
    frame = sys._current_frames()[main]
    if not waits(frame):
        where = "".join(traceback.format_stack(frame))
        said = f"no progress for {seconds:g} s (deepspeed.timeout); it hangs here:\n{where}"
    elif stopped := _stopped_siblings():
        said = f"waited {seconds:g} s (deepspeed.timeout) for {', '.join(stopped)}, whose process is stopped"
    else:
        time.sleep(PATIENCE)
        said = f"waited {seconds:g} s (deepspeed.timeout) for the other ranks, one of which hangs or cannot be reached"
    print(f"\n{me}: {said}", file=sys.stderr, flush=True)
    os._exit(1)


def waits(frame: FrameType | None) -> bool:
    """Whether a stack's innermost frame, whose call into native code has not come back, is a wait for other ranks."""
    return frame is not None and any(pair in WAITING for pair in pairwise(Path(frame.f_code.co_filename).parts))


def _stopped_siblings() -> list[str]:
    """The ranks of this host whose process is stopped."""
    try:
        siblings = psutil.Process(os.getppid()).children()
        return [f"pid {p.pid}" for p in siblings if p.status() == psutil.STATUS_STOPPED]
    except psutil.Error:
        return []
