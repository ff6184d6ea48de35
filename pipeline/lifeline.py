"""No rank outlives its job: it ends with the launcher above it and with the `relay run` above that."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

OWNER = "RELAY_PARENT"
"""Environment variable with the process that the ranks belong to: its pid and when it was born."""


def owner() -> str:
    """This process, for the environment of the ranks that it starts."""
    return f"{os.getpid()}:{_born(os.getpid())}"


def die_with_parents() -> None:
    """End this process when the launcher above it, or `relay run` above that, is gone; nothing else would.

    A launcher killed while its ranks were still importing counts as well: they find another parent than the one they were
    started by, or the owner's pid free or taken by somebody else.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the kernel's part, for the direct parent
    watched = [(pid, _born(pid)) for pid in (os.getppid(), _parent_of(os.getppid())) if pid > 1]
    if owner := os.environ.get(OWNER):
        pid, _, born = owner.partition(":")
        watched.append((int(pid), born))

    def watch() -> None:
        while all(_born(pid) == born for pid, born in watched):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parents", daemon=True).start()


def _born(pid: int) -> str:
    """When a process began, so that a reused pid is not mistaken for it; empty when it has ended, waited for or not."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _parent_of(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
