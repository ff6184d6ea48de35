"""What a run tells its readers beside its results: how it was called, with which versions, and each launch of a stage.

Nothing here decides what runs; a folder without these files is read all the same.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.handoff import replace

RUN = "run.json"
LAUNCHES = "launches.jsonl"
LIBRARIES = (
    "relay-rlhf",
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "datasets",
    "accelerate",
    "bitsandbytes",
)


def begin(run_dir: Path, recipe: Recipe, written: dict[str, Any], command: list[str]) -> None:
    """Leave `run.json`: the recipe as `written` with its overrides, the stages in their order, and where the run is made."""
    stages = {
        name: {"kind": recipe.stages[name].kind, "upstream": recipe.parents(name), "base": _base(recipe, name)}
        for name in recipe.order()
    }
    record = {
        "name": recipe.name,
        "recipe_file": str(recipe.path),
        "recipe": written,
        "stages": stages,
        "command": command,
        "started": round(time.time(), 3),
        "environment": environment(),
    }
    replace(run_dir / RUN, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def _base(recipe: Recipe, stage: str) -> str | None:
    base = recipe.stages[stage].base
    return base.model if base else None


def environment() -> dict[str, str]:
    """Versions by distribution, the host, its system and its processors; without importing any of those."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {**found, "system": system, "host": socket.gethostname(), "processors": str(os.cpu_count())}


def note(stage_dir: Path, event: str, **facts: Any) -> None:
    """Add an event to `launches.jsonl`. A disk that takes no more stops nothing here."""
    with suppress(OSError), (stage_dir / LAUNCHES).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"event": event, "time": round(time.time(), 3), **facts}) + "\n")


@contextmanager
def launch(stage_dir: Path, ranks: int) -> Iterator[None]:
    """Note when a launch of a stage begins and how it ends; one that is killed leaves no end."""
    note(stage_dir, "start", ranks=ranks, host=socket.gethostname(), pid=os.getpid())
    try:
        yield
    except BaseException as error:
        note(stage_dir, "end", error=type(error).__name__, says=str(error)[:2000])
        raise
    note(stage_dir, "end", error=None)


def command() -> list[str]:
    """The command line as it was typed, but for the folder that the program lies in."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
