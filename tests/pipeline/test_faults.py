"""Whose word an error is, what the machine is told to be at fault for, and when a rank counts as hung."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline import faults
from pipeline.errors import Trouble, UserError

pytestmark = pytest.mark.fast

WATCHED = """
import sys, time
from pipeline.watchdog import progress, rest, watchdog
with watchdog(1.0, 0, 1):
    time.sleep(2.5)      # nothing has been joined yet
    progress()
    rest()
    time.sleep(2.5)      # rank 0's own work
    print('goes on', flush=True)
    progress()
    time.sleep(60)
"""


def refused_while(error: Exception) -> Exception:
    """`error`, raised because an endpoint refused the connection, which it keeps as its context."""

    def ask() -> None:
        try:
            urllib.request.urlopen("http://127.0.0.1:9/", timeout=5)
        except OSError:
            raise error from None

    with pytest.raises(type(error)) as caught:
        ask()
    assert isinstance(caught.value.__context__.reason, ConnectionRefusedError)  # type: ignore[union-attr]
    return caught.value


@pytest.mark.parametrize(("error", "code"), [(Trouble("no reward comes"), 3), (UserError("reward", "not there"), 2)])
def test_an_endpoint_that_refuses_is_no_lost_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    assert faults.tell(refused_while(error), tmp_path, 0, 2) == code
    assert capsys.readouterr().err == f"\n{error}\n"


def test_what_torch_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that torch could not write: the disk is full only where there is no room left."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert "the disk fails to read or write" in str(faults.machine(error, tmp_path))
    monkeypatch.setattr(faults, "LITTLE", 2**80)
    assert "the disk is full" in str(faults.machine(error, tmp_path / "not" / "there"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_the_path_is_named(tmp_path: Path, number: int) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "file"))
    assert str(faults.machine(error, tmp_path)).startswith(f"{tmp_path / 'file'}: ")


def test_other_errors_are_nobody_s_but_the_programmer_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a").read_text()
    assert faults.machine(caught.value, tmp_path) is None
    assert faults.tell(caught.value, tmp_path, 0, 2) == 1
    said = capsys.readouterr().err
    assert "rank 0 of 2 failed:" in said
    assert "FileNotFoundError" in said


def test_hung_only_between_joining_and_work_of_one_s_own() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert done.stdout == "goes on\n"
    assert "rank 0 of 1: no progress for 1 s (deepspeed.timeout); it hangs here:" in done.stderr
