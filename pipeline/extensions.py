"""Kernels that DeepSpeed compiles at first use: a compilation that was killed must not hold up every later run.

torch marks one by a file named `lock`, on which other processes wait as long as it is there. It stays when its owner is killed.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from pipeline.watchdog import progress

ELSEWHERE = 120.0
"""Seconds for which a mark that no process of this host has open may be that of another host with the same home."""


def free_builds(root: Path | None = None, elsewhere: float = ELSEWHERE) -> None:
    """Remove the marks of compilations that ended without removing their own."""
    for mark in _marks(root):
        while not _held(mark):
            with (mark.parent / "lock.check").open("a") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)  # else one rank would remove what another has just made
                if not _held(mark) and _age(mark) >= elsewhere:
                    mark.unlink(missing_ok=True)
            if not mark.exists():
                break
            progress()
            time.sleep(0.5)


def left_behind() -> list[Path]:
    """Marks of compilations that no process of this host is at."""
    return [mark for mark in _marks() if not _held(mark)]


def _marks(root: Path | None = None) -> list[Path]:
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def _age(mark: Path) -> float:
    try:
        return time.time() - mark.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _held(mark: Path) -> bool:
    """Whether a process of this host has the file open, as torch has while it compiles."""
    mark = mark.resolve()  # as the kernel shows it, without symbolic links
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if opened.readlink() == mark:
                return True
        except OSError:
            continue
    return False
