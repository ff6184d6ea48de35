"""Run programs that a model wrote, each in a process of its own that can do nothing else; see `jail` for what it gives up.

A program has an empty directory, which is removed with it. It passed if it ran to its end: the process then says a word that
is drawn anew for each program, so that leaving early is no success.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError

JAIL = Path(__file__).with_name("jail.py")
POLL = 0.05
"""Seconds between two looks at a program's directory."""
LONGEST = 4096
"""Bytes of a report that are read."""


@dataclass(frozen=True)
class Limits:
    """`seconds` by the clock, and of CPU time rounded up; bytes of address space, of one file, and of a whole directory."""

    seconds: float = 10.0
    memory: int = 1 << 30
    file: int = 1 << 20
    directory: int = 1 << 24


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and why in a few words."""

    status: Literal["passed", "failed", "timed out", "killed"]
    reason: str = ""


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Run one program. Raises UserError where this machine cannot hold it in."""
    with tempfile.TemporaryDirectory(prefix="relay-sandbox-") as folder:
        return _run(program, limits, Path(folder))


def run_all(programs: Sequence[str], limits: Limits = Limits()) -> list[Outcome]:
    """All of them, as many at once as there are processors, in order."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


def _run(program: str, limits: Limits, folder: Path) -> Outcome:
    token = secrets.token_hex(16)
    ours, theirs = os.pipe()
    given = {
        "program": program,
        "token": token,
        "report": theirs,
        "memory": limits.memory,
        "cpu": int(limits.seconds) + 1,
        "file": limits.file,
    }
    try:
        process = subprocess.Popen(  # nosec B603 # this interpreter, on this package's script
            [sys.executable, "-I", "-S", "-B", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs],
            cwd=folder,
            env={},
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    try:
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(json.dumps(given).encode())
        report, stopped = _watch(ours, limits, folder)
        if stopped is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    if stopped is not None:
        return stopped
    said, _, rest = report.decode("utf-8", "replace").partition(" ")
    if said != token:
        return Outcome(
            "killed" if process.returncode < 0 else "failed", f"left before its end, code {process.returncode}"
        )
    how, _, reason = rest.partition(" ")
    if how == "refused":
        raise UserError(
            "the sandbox for programs",
            f"this machine cannot hold them in: {reason}",
            expected="Linux 5.13 or later with Landlock and seccomp, on x86_64 or aarch64",
            fix="run the evaluate stage on such a machine, or leave out `forgetting.code`",
        )
    return Outcome("passed" if how == "passed" else "failed", reason)


def _watch(report: int, limits: Limits, folder: Path) -> tuple[bytes, Outcome | None]:
    """(what the process reports until it ends; an outcome, if it had to be stopped before)."""
    end, found = time.monotonic() + limits.seconds, b""
    while time.monotonic() < end:
        if select.select([report], [], [], POLL)[0]:
            part = os.read(report, LONGEST)
            found = (found + part)[:LONGEST]
            if not part:
                return found, None
        if _size(folder) > limits.directory:
            return found, Outcome("killed", f"more than {limits.directory} bytes in its directory")
    return found, Outcome("timed out", f"more than {limits.seconds:g} s")


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total
