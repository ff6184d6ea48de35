"""Every file of every checkpoint and baton, cut, altered by a bit, or gone: named before it is used, and never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import checkpoint, handoff
from pipeline.errors import UserError
from tests.faults.test_resume import assert_same_files
from tests.support import tiny
from tests.support.session import Ranks

STAGES = ("sft", "reward", "ppo")


def cut(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(bytes(raw))


DAMAGES: tuple[Callable[[Path], None], ...] = (cut, flip, Path.unlink)


@pytest.fixture(scope="module")
def finished(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A recipe and its finished run; every stage's checkpoints of steps 2 and 4 are there."""
    folder = tmp_path_factory.mktemp("corrupt")
    keep = {f"stages__{stage}__keep_checkpoints": 2 for stage in STAGES}
    recipe = tiny.recipe(folder / "tiny.yaml", tiny_llama, **keep)
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(folder / "run"))
    return recipe, folder / "run"


def damaged(folder: Path) -> list[tuple[str, Path, Callable[[Path], None]]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(file.relative_to(folder).as_posix(), file, act) for file in files for act in DAMAGES]


def logged(folder: Path) -> list[tuple[int, float]]:
    """How many tokens each step of a trainer had seen since the stage began; of PPO, the KL."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    counts = [(row["step"], row[name]) for row in rows for name in ("num_tokens", "objective/kl") if name in row]
    assert counts
    return counts


@pytest.mark.parametrize("stage", STAGES)
def test_each_file_of_a_checkpoint(finished: tuple[Path, Path], stage: str) -> None:
    newest = checkpoint.newest(finished[1] / stage / "checkpoints")
    assert newest is not None
    assert checkpoint.step_of(newest) == 4
    cases = damaged(newest)
    assert len({name for name, *_ in cases}) >= 5
    for name, file, act in cases:
        whole = file.read_bytes()
        if whole or act is Path.unlink:  # an empty file, as accelerate writes some, has nothing else to lose
            act(file)
            problem = checkpoint.damage(newest)
            assert problem is not None, f"{act.__name__} of {name} was not seen"
            assert problem.startswith(name)
            file.write_bytes(whole)
    assert checkpoint.damage(newest) is None


@pytest.mark.parametrize("stage", STAGES)
def test_each_file_of_a_baton(finished: tuple[Path, Path], stage: str) -> None:
    folder = finished[1] / stage
    for name, file, act in damaged(folder / "output"):
        whole = file.read_bytes()
        act(file)
        with pytest.raises(UserError) as told:
            handoff.open_baton(folder)
        assert f"output/{name}" in str(told.value)
        assert f"--from {stage}" in str(told.value)
        file.write_bytes(whole)
    assert handoff.open_baton(folder).manifest["stage"] == stage


def test_resume_from_the_last_good_checkpoint(
    ranks: Callable[[int], Ranks], finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """A bit of the newest checkpoint's largest file flipped: each stage goes on from the one before, to the same bytes."""
    recipe, undisturbed = finished
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for stage in STAGES:
        shutil.rmtree(run / stage / "output")
        newest = checkpoint.newest(run / stage / "checkpoints")
        assert newest is not None
        flip(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
        ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage=stage, run_dir=str(run))
        assert_same_files(run, undisturbed, stage)
        assert logged(run / stage) == logged(undisturbed / stage)
        assert newest.with_name(newest.name + ".damaged").is_dir()


def test_downstream_refuses_a_damaged_baton(
    ranks: Callable[[int], Ranks], finished: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, undisturbed = finished
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for stage, downstream in (("sft", "reward"), ("reward", "ppo")):
        flip(run / stage / "output" / "adapter_model.safetensors")
        told = ranks(2).call("tests.support.stages:refused", recipe=str(recipe), stage="ppo", run_dir=str(run))
        assert all(f"{stage}/output/adapter_model.safetensors: altered" in text for text in told), downstream
        assert all(f"--from {stage}" in text for text in told)
        flip(run / stage / "output" / "adapter_model.safetensors")
