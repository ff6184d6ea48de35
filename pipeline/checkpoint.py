"""A checkpoint counts only when it is complete: `COMPLETE.json`, written last, holds the sha256 of each of its files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.data.read import file_hash
from pipeline.handoff import sealed, sync, unsealed, write_json

MARKER = "COMPLETE.json"


def complete(folder: Path, facts: dict[str, Any]) -> None:
    """Mark `folder` complete. `facts` (such as a metric) are kept beside the hashes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    for file in files:
        sync(file)
    hashes = {p.relative_to(folder).as_posix(): file_hash(p) for p in files}
    write_json(folder / MARKER, sealed({**facts, "files": hashes}))
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when its files are those it was completed with.

    Checkpoints hold pickles (DeepSpeed's are read without `weights_only`), so nothing reads one before this has looked at it,
    and none may hold a file more: a reader may look for files by pattern.
    """
    record = unsealed(folder / MARKER)
    if record is None:
        return f"{MARKER} is missing or was altered"
    expected = record["files"]
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MARKER}
    for name in sorted(found - expected.keys()):
        return f"{name} is not in {MARKER}"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_hash(path) != digest:
            return f"{name} was altered"
    return None


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MARKER).read_text(encoding="utf-8")))


def sizes(folder: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The sizes under which a training that resumes `folder` has run, each with the step it began at; the last is `now`."""
    past = facts(folder).get("sizes") or [{"from_step": 0, **now}]
    return [*past, {"from_step": step_of(folder), **now}] if resized(folder, now) else list(past)


def resized(folder: Path, now: dict[str, Any]) -> bool:
    """Whether `folder` was saved under another size than `now`."""
    past = facts(folder).get("sizes") or [now]
    return not past[-1].items() >= now.items()


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def newest(checkpoints: Path) -> Path | None:
    """The newest undamaged checkpoint. Damaged ones are reported and set aside; incomplete ones are removed."""
    for cut in checkpoints.glob("*.writing"):
        shutil.rmtree(cut, ignore_errors=True)
    for folder in sorted(_all(checkpoints), key=step_of, reverse=True):
        if not (folder / MARKER).exists():
            print(f"checkpoint {folder} is removed: it has no {MARKER}, so it was never whole", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"checkpoint {folder} is left out: {problem}", flush=True)
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    return None


def rotate(checkpoints: Path, keep: int, *kept: Path | None) -> None:
    """Delete all but the newest `keep` complete checkpoints and those in `kept`, such as the best one."""
    done = sorted((p for p in _all(checkpoints) if (p / MARKER).exists()), key=step_of)
    for folder in done[:-keep]:
        if folder.resolve() not in {other.resolve() for other in kept if other is not None}:
            shutil.rmtree(folder, ignore_errors=True)


def steps(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    return sorted(step_of(p) for p in _all(checkpoints) if (p / MARKER).exists())


def set_aside(checkpoints: Path, step: int) -> None:
    """Rename the checkpoints of `step` and later, so that a resume takes an earlier one; nothing if there is none earlier."""
    if any(number < step for number in steps(checkpoints)):
        for folder in [p for p in _all(checkpoints) if step_of(p) >= step]:
            aside = folder.with_name(folder.name + ".suspect")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)


def _all(checkpoints: Path) -> list[Path]:
    return [p for p in checkpoints.glob("*-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
