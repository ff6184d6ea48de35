"""One run directory, one writer. The kernel drops a lock with its holder, so a killed run leaves none behind."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir/.lock`. Raises UserError naming the holder when another process has it."""
    _make(run_dir)
    _warn(run_dir)
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


@contextmanager
def of_a_rank(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir/.ranks`, which all ranks share."""
    _make(run_dir)
    with (run_dir / ".ranks").open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def await_ranks(run_dir: Path, patience: float = 60.0) -> None:
    """Wait for ranks of a run that was killed a moment ago: they write until they notice. Raises UserError when they stay."""
    limit = time.monotonic() + patience
    with (run_dir / ".ranks").open("a", encoding="utf-8") as stream:
        while True:
            try:
                return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise UserError(
                        f"run directory {run_dir}",
                        f"ranks of an earlier run still hold it after {patience:g} s",
                        expected="that they end with the run they belong to",
                        fix="look for processes with that --run-dir and end them",
                    ) from None
                time.sleep(0.1)


def _make(run_dir: Path) -> None:
    """Make the run directory, for its owner alone: it holds data, and checkpoints with pickles. One that is there stays as it
    is; others may be meant to read it."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(mode=0o700, exist_ok=True)


def _warn(run_dir: Path) -> None:
    if run_dir.stat().st_mode & stat.S_IWOTH:
        print(
            f"run directory {run_dir}: every user of this machine can write there, and what lies in checkpoints is run; "
            f"chmod o-w {run_dir}",
            file=sys.stderr,
            flush=True,
        )


def _holder(text: str) -> str:
    try:
        record = json.loads(text)
        return f"pid {record['pid']} on {record['host']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its pid is not recorded"
