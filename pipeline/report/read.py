"""A run's folder as data for a page: state, lineage, curves, tables and samples of each stage. Reads only, whatever is there.

A run may be under way, killed, of an older version, or damaged: what cannot be read is left out or said, never raised.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import yaml

from pipeline import handoff
from pipeline.chain import REDO
from pipeline.errors import UserError
from pipeline.records import LAUNCHES, RUN
from pipeline.report import tables
from pipeline.report.series import Series

SAMPLES = 200
"""So many of a stage's newest samples are shown."""

FRESH = 120.0
"""Seconds since its last metrics for which a run of another host counts as running."""

HEADLINES = ("eval/score", "objective/scores", "held_out/loss", "held_out/accuracy", "loss")
View = dict[str, Any]


def read_run(run_dir: Path, series: dict[Path, Series] | None = None) -> View:
    """All that the page shows of one run. `series` keeps what was read of metrics files from one call to the next."""
    record = _json(run_dir / RUN) or {}
    order = stage_names(run_dir, record)
    live = running(run_dir)
    known = {} if series is None else series
    stages = {name: _stage(run_dir, name, record.get("stages", {}).get(name, {}), live, known) for name in order}
    recipe = record.get("recipe")
    return {
        "name": record.get("name") or run_dir.name,
        "folder": str(run_dir),
        "state": _state([stage["state"] for stage in stages.values()], live),
        "updated": updated(run_dir, order),
        "started": record.get("started"),
        "command": record.get("command"),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None,
        "keys": tables.flat(recipe or {}),
        "environment": record.get("environment") or _versions(stages),
        "order": order,
        "stages": {name: {k: v for k, v in stage.items() if k != "versions"} for name, stage in stages.items()},
    }


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has been locked once, or holds a stage's output."""
    return (folder / ".lock").is_file() or any(folder.glob("*/output/manifest.json"))


def summary(run_dir: Path) -> View:
    """A line about a run, from the ends of its files alone."""
    record = _json(run_dir / RUN) or {}
    order, live = stage_names(run_dir, record), running(run_dir)
    states, best = {}, {}
    for name in order:
        published = (handoff.current(run_dir / name) / handoff.MANIFEST).is_file()
        launches = tables.rows(run_dir / name / LAUNCHES)
        states[name] = _of_stage(published and not (run_dir / name / REDO).exists(), launches, live)[0]
        last = _last_row(run_dir / name / "metrics.jsonl")
        found = next((key for key in HEADLINES if key in last), None)
        if found:
            best[name] = {"step": last.get("step"), "metric": found, "value": last[found]}
    return {
        "id": run_dir.name,
        "name": record.get("name") or run_dir.name,
        "folder": str(run_dir),
        "state": _state(list(states.values()), live),
        "updated": updated(run_dir, order),
        "stages": states,
        "latest": best,
    }


def stage_names(run_dir: Path, record: View) -> list[str]:
    """The recipe's stages in their order, or those that left something."""
    if record.get("stages"):
        return list(record["stages"])
    found = [p for p in run_dir.iterdir() if p.is_dir() and not p.name.startswith(".")] if run_dir.is_dir() else []
    left = [p for p in found if any((p / name).exists() for name in (handoff.OUTPUT, "metrics.jsonl", LAUNCHES))]
    return [p.name for p in sorted(left, key=lambda p: p.stat().st_mtime)]


def updated(run_dir: Path, order: list[str]) -> float:
    """When anything of the run last changed, in seconds since the epoch."""
    names = ("metrics.jsonl", LAUNCHES, handoff.OUTPUT)
    return max((_mtime(p) for p in [run_dir / RUN, *(run_dir / s / n for s in order for n in names)]), default=0.0)


def running(run_dir: Path) -> bool:
    """Whether a process writes to the run. Its lock is looked at, never tried: a try could make a starting run fail."""
    lock = run_dir / ".lock"
    holder = _json(lock)
    if not isinstance(holder, dict):
        return False
    if holder.get("host") != socket.gethostname():
        newest = max((_mtime(p) for p in run_dir.glob("*/metrics.jsonl")), default=0.0)
        return time.time() - newest < FRESH
    try:
        held = Path("/proc/locks").read_text(encoding="utf-8")
        inode = str(lock.stat().st_ino)
    except OSError:  # not Linux
        return _alive(int(holder.get("pid", 0)))
    return any(line.split()[1] == "FLOCK" and line.split()[5].split(":")[-1] == inode for line in held.splitlines())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _stage(run_dir: Path, name: str, known: View, live: bool, kept: dict[Path, Series]) -> View:
    folder = run_dir / name
    launches = tables.rows(folder / LAUNCHES)
    manifest, damage = _manifest(folder)
    metrics = kept.setdefault(folder / "metrics.jsonl", Series(folder / "metrics.jsonl"))
    metrics.update()
    state, why = _of_stage(manifest is not None and not (folder / REDO).exists(), launches, live)
    spent, count = _spent(folder, launches, metrics.last_time, state == "running")
    ranks = next((row["ranks"] for row in reversed(launches) if "ranks" in row), (manifest or {}).get("world_size"))
    facts = manifest or {}
    block = facts.get("inputs", {}).get("block", {})
    return {
        "kind": known.get("kind") or facts.get("kind"),
        "state": "damaged" if damage else state,
        "why": damage or why,
        "step": metrics.last_step,
        "total": next((row["last"] for row in reversed(launches) if row.get("event") == "steps"), block.get("steps")),
        "seconds": spent,
        "launches": count,
        "devices": ranks,
        "device_hours": spent * ranks / 3600 if spent is not None and ranks else None,
        "hash": facts.get("content_hash"),
        "parents": facts.get("parents", {}),
        "upstream": known.get("upstream") or list(facts.get("parents", {})),
        "base": facts.get("base") or ({"model": known["base"]} if known.get("base") else None),
        "trained": facts.get("adapter"),
        "zero": facts.get("zero_stage"),
        "seed": facts.get("seed"),
        "data": [{k: v for k, v in source.items() if not isinstance(v, dict)} for source in facts.get("data", [])],
        "files": len(facts["files"]) if "files" in facts else None,
        "metrics": facts.get("metrics", {}),
        "series": metrics.thinned(),
        "warnings": [
            {"step": row.get("step"), "text": str(row.get("text", "")).removeprefix("warning: ")}
            for row in tables.rows(folder / "warnings.jsonl")
        ],
        "samples": tables.samples(_samples(folder)),
        "tables": tables.tested(facts.get("metrics", {}), handoff.current(folder)) if manifest else {},
        "versions": facts.get("versions", {}),
    }


def _samples(folder: Path) -> list[View]:
    """An evaluate stage's pairs where it published some, else the newest of what the stage wrote on its way."""
    return tables.rows(handoff.current(folder) / "samples.jsonl", SAMPLES) or tables.rows(
        folder / "samples.jsonl", -SAMPLES
    )


def _of_stage(published: bool, launches: list[View], live: bool) -> tuple[str, str]:
    """(state, why) of a stage by its last launch; of one without any, by what lies there."""
    last = next((row for row in reversed(launches) if row.get("event") in ("start", "end")), None)
    if last is None:
        return ("done", "published") if published else ("waiting", "its turn comes") if live else ("not run", "")
    if last["event"] == "start":
        if live:
            return "running", ""
        return ("done", "published") if published else ("failed", "ended without a word, as a killed process does")
    if last.get("error") is None:
        return ("done", "published") if published else ("failed", "ended, and nothing is published")
    if last["error"] == "Stopped":
        return "stopped", "asked to stop; saved, and the same command goes on"
    return "failed", str(last.get("says") or last["error"]).strip()


def _state(stages: list[str], live: bool) -> str:
    if live:
        return "running"
    for state in ("damaged", "failed", "stopped"):
        if state in stages:
            return state
    return "done" if stages and all(state == "done" for state in stages) else "unfinished"


def _spent(folder: Path, launches: list[View], last: float | None, live: bool) -> tuple[float | None, int]:
    """(seconds of all launches, how many): one that left no end lasted until its last metrics, or the next launch's start."""
    starts = [number for number, row in enumerate(launches) if row.get("event") == "start"]
    if not starts:
        session = _json(folder / "session.json") or {}
        return session.get("seconds"), 1 if session else 0
    total = 0.0
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        began = launches[start]["time"]
        ends = [row["time"] for row in launches[start:following] if row.get("event") == "end"]
        if ends:
            end = ends[-1]
        elif following is not None:
            end = max((row["time"] for row in launches[start:following]), default=began)
        else:
            end = time.time() if live else max(last or began, began)
        total += max(0.0, end - began)
    return round(total, 1), len(starts)


def _manifest(folder: Path) -> tuple[View | None, str]:
    try:
        return handoff.read_manifest(folder), ""
    except (UserError, OSError, ValueError) as error:
        return None, str(error)


def _versions(stages: dict[str, View]) -> dict[str, str]:
    return next((stage["versions"] for stage in stages.values() if stage.get("versions")), {})


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _last_row(path: Path, tail: int = 65536) -> View:
    """The numbers of a metrics file's last rows, the newest of each name."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - tail))
            lines = stream.read().split(b"\n")
    except OSError:
        return {}
    merged: View = {}
    for line in lines[-20:]:
        try:
            merged |= json.loads(line)
        except (ValueError, TypeError):
            continue
    return merged


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
