"""A compilation killed half-way leaves its mark on the disk; the next run goes on, and one under way is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.extensions import free_builds

pytestmark = pytest.mark.fast

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("compiles", flush=True)
time.sleep(3600)
"""


def test_mark_of_a_killed_builder(tmp_path: Path) -> None:
    mark = tmp_path / "py311_cpu" / "op" / "lock"
    mark.parent.mkdir(parents=True)
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(mark)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "compiles\n"
    os.utime(mark, (0, 0))  # old, and yet its owner compiles still
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for root in (tmp_path, link):
        free_builds(root, elsewhere=0.0)
        assert mark.exists()

    builder.kill()
    builder.wait()
    assert mark.exists(), "else this test shows nothing"
    free_builds(tmp_path, elsewhere=0.0)
    assert not mark.exists()


def test_fresh_mark_may_be_of_another_host(tmp_path: Path) -> None:
    mark = tmp_path / "op" / "lock"
    mark.parent.mkdir()
    mark.touch()
    began = time.monotonic()
    free_builds(tmp_path, elsewhere=1.0)
    assert not mark.exists()
    assert time.monotonic() - began > 0.5
