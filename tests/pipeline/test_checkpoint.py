"""A checkpoint counts only when it is complete and unaltered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint

pytestmark = pytest.mark.fast


def save(checkpoints: Path, step: int, *, name: str = "step", **facts: Any) -> Path:
    """A complete checkpoint with one nested file."""
    folder = checkpoints / f"{name}-{step}"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "state.pt").write_bytes(b"state" * step)
    (folder / "random.pt").write_bytes(b"random")
    checkpoint.complete(folder, {"step": step, **facts})
    return folder


def names(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.iterdir())


def flip(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:3] + bytes([raw[3] ^ 1]) + raw[4:])


def reword(folder: Path, old: bytes, new: bytes) -> None:
    """Alter the step that the marker records."""
    marker = folder / "COMPLETE.json"
    text = marker.read_bytes()
    assert b'"step": ' + old in text
    marker.write_bytes(text.replace(b'"step": ' + old, b'"step": ' + new))


def test_complete_records_hashes_and_facts(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, loss=0.25)
    record = json.loads((folder / "COMPLETE.json").read_text(encoding="utf-8"))
    assert sorted(record["files"]) == ["engine/state.pt", "random.pt"]
    assert record["files"]["random.pt"] == "a441b15fe9a3cf56661190a0b93b9dec7d04127288cc87250967cf3b52894d11"
    assert checkpoint.facts(folder)["loss"] == 0.25
    assert checkpoint.step_of(folder) == 3
    assert checkpoint.damage(folder) is None
    checkpoint.complete(folder, {"step": 3})
    assert checkpoint.damage(folder) is None, "completing twice does not hash the marker"


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda folder: flip(folder / "engine" / "state.pt"), "engine/state.pt was altered"),
        (lambda folder: (folder / "random.pt").write_bytes(b""), "random.pt was altered"),
        (lambda folder: (folder / "random.pt").unlink(), "random.pt is missing"),
        (lambda folder: (folder / "COMPLETE.json").unlink(), "COMPLETE.json is missing or was altered"),
        (lambda folder: (folder / "COMPLETE.json").write_text("{"), "COMPLETE.json is missing or was altered"),
        (lambda folder: (folder / "COMPLETE.json").write_text("{}"), "COMPLETE.json is missing or was altered"),
        (lambda folder: reword(folder, b"3", b"4"), "COMPLETE.json is missing or was altered"),
        (lambda folder: (folder / "more.pt").touch(), "more.pt is not in COMPLETE.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, act: Callable[[Path], Any], found: str) -> None:
    folder = save(tmp_path, 3)
    act(folder)
    assert checkpoint.damage(folder) == found


def test_newest_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-100"


def test_trl_s_names_count_too(tmp_path: Path) -> None:
    save(tmp_path, 4, name="checkpoint")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-4"


def test_newest_falls_back_to_an_older_good_one_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    flip(tmp_path / "step-30" / "engine" / "state.pt")
    (tmp_path / "step-20" / "random.pt").unlink()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-10"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"checkpoint {tmp_path / 'step-30'} is left out: engine/state.pt was altered",
        f"checkpoint {tmp_path / 'step-20'} is left out: random.pt is missing",
    ]


def test_newest_removes_what_was_never_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 10)
    for name in ("step-20", "step-20.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.pt").write_bytes(b"half")
    (tmp_path / "inputs_hash").write_text("abc", encoding="utf-8")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-10"
    assert not (tmp_path / "step-20").exists()
    assert f"checkpoint {tmp_path / 'step-20'} is removed: it has no COMPLETE.json" in capsys.readouterr().out
    assert (tmp_path / "inputs_hash").exists()


def test_newest_of_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "not there") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [100]), (2, [20, 100]), (9, [9, 20, 100])])
def test_rotate_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (9, 20, 100):
        save(tmp_path, step)
    checkpoint.rotate(tmp_path, keep)
    assert sorted(map(checkpoint.step_of, tmp_path.iterdir())) == left


def test_rotate_keeps_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    checkpoint.rotate(tmp_path, 1, tmp_path / "step-20")
    assert names(tmp_path) == ["step-20", "step-40"]
    save(tmp_path, 50)
    checkpoint.rotate(tmp_path, 1, tmp_path / "step-50")
    assert names(tmp_path) == ["step-50"]
    checkpoint.rotate(tmp_path, 1, tmp_path / "step-0")
    assert names(tmp_path) == ["step-50"]


def test_suspect_checkpoints_are_set_aside(tmp_path: Path) -> None:
    """From step 30 on; but never the only ones there are."""
    for step in (20, 30, 40):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [20, 30, 40]
    checkpoint.set_aside(tmp_path, 30)
    assert names(tmp_path) == ["step-20", "step-30.suspect", "step-40.suspect"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-20"
    checkpoint.set_aside(tmp_path, 20)
    assert checkpoint.steps(tmp_path) == [20]


def test_rotate_does_not_delete_good_checkpoints_in_favour_of_a_damaged_one(tmp_path: Path) -> None:
    """Step 30 was damaged, the run resumed from step 20 and saved step 25: that one must stay."""
    for step in (20, 30):
        save(tmp_path, step)
    flip(tmp_path / "step-30" / "engine" / "state.pt")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-20"
    save(tmp_path, 25)
    checkpoint.rotate(tmp_path, 1)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-25"
