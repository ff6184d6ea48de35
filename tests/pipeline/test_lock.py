"""One run directory, one writer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.lock import run_lock

pytestmark = pytest.mark.fast

HOLD = """
import sys
from pathlib import Path
from pipeline.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        with pytest.raises(UserError) as error, run_lock(tmp_path / "run"):
            pass
        assert str(error.value).splitlines() == [
            f"run directory {tmp_path}/run: another process writes to it: pid {process.pid} on {socket.gethostname()}",
            "  expected one writer",
            "  fix: wait for it or stop it, or choose another --run-dir",
        ]
        with run_lock(tmp_path / "another run"):
            pass


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        with run_lock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_it_is_released_in_order_and_after_an_error(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        pass
    with pytest.raises(RuntimeError, match="training failed"), run_lock(tmp_path):
        raise RuntimeError("training failed")
    with holder(tmp_path):
        pass


def test_an_unreadable_record_of_the_holder_is_said(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / ".lock").write_text("", encoding="utf-8")
        with pytest.raises(UserError, match="its pid is not recorded"), run_lock(tmp_path):
            pass
