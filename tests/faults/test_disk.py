"""A disk that fills up at every write of a stage, or turns read-only: told in a paragraph, nothing lost, resumed after."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import checkpoint, handoff
from tests.faults.test_resume import assert_same_files
from tests.support import tiny
from tests.support.session import Ranks

STEP = 192
"""KiB that the disk grows by after each failure."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False)
    if made.returncode != 0:
        pytest.skip("this user may not mount file systems")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def whole(run: Path, stage: str) -> list[int]:
    """The steps of the stage's complete checkpoints, none of which may be damaged."""
    folders = [p for p in (run / stage / "checkpoints").glob("*-*") if (p / checkpoint.MARKER).exists()]
    assert [checkpoint.damage(folder) for folder in folders] == [None] * len(folders)
    return sorted(map(checkpoint.step_of, folders))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_full_at_every_write(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, disk: Path, stage: str
) -> None:
    """From no room at all up to room for everything; read-only once on the way."""
    saved = {f"stages__{stage}__save_every": 1, f"stages__{stage}__keep_checkpoints": 1}
    recipe = str(tiny.recipe(tmp_path / "tiny.yaml", tiny_llama, data__holdout=0.0, **saved))
    if stage == "ppo":
        ranks(1).call("tests.support.stages:chain", recipe=recipe, run_dir=str(tmp_path / "run"), until="reward")
        for parent in ("sft", "reward"):
            (disk / parent).mkdir()
            os.symlink(tmp_path / "run" / parent / "output", disk / parent / "output")
    ranks(1).call("tests.support.stages:run", recipe=recipe, stage=stage, run_dir=str(tmp_path / "run"))

    size, told, reached = 64, [], [0]
    while (said := ranks(1).call("tests.support.stages:told", recipe=recipe, stage=stage, run_dir=str(disk))[0]) != "":
        told.append(said)
        assert "the disk is full" in said, said
        assert re.search(r"[\d.]+ MiB free there", said)
        steps = whole(disk, stage)
        assert max(steps, default=0) >= max(reached), "a checkpoint that was there is lost"
        reached += steps
        assert handoff.read_manifest(disk / stage) is None
        if len(told) == 3:
            remount(disk, "ro")
            said = ranks(1).call("tests.support.stages:told", recipe=recipe, stage=stage, run_dir=str(disk))[0]
            assert "the file system is read-only" in said
            remount(disk, "rw")
        size += STEP
        assert size < 64 * STEP, told
        remount(disk, f"size={size}k")
    print(*told, sep="\n")
    assert len(told) >= 3
    assert len(set(reached)) >= 2, "a failure with a checkpoint to go on from"
    assert_same_files(disk, tmp_path / "run", stage)
