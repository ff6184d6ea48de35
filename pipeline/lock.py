"""One run directory, one writer. The kernel drops the lock with its holder, so a killed run leaves none behind."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir/.lock`. Raises UserError naming the holder when another process has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".lock"
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = _holder(stream.read())
            raise UserError(
                f"run directory {run_dir}",
                f"another process writes to it: {holder}",
                expected="one writer",
                fix="wait for it or stop it, or choose another --run-dir",
            ) from None
        stream.seek(0)
        stream.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, stream)
        stream.flush()
        yield


def _holder(text: str) -> str:
    try:
        record = json.loads(text)
        return f"pid {record['pid']} on {record['host']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its pid is not recorded"
