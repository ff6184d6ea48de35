"""A published run, and its `ppo` exported as a full model in several files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.export.command import export
from tests.support import published

STAGES = ("sft", "reward", "ppo", "evaluate", "whole", "packed")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return published.run(published.recipe(folder), folder / "run", STAGES)


@pytest.fixture(scope="session")
def exported(run: Path) -> Callable[..., Path]:
    """`exported(stage, merge=True, …)`: the folder that `relay export` writes, once for the same arguments."""
    made: dict[str, Path] = {}

    def make(stage: str, **options: object) -> Path:
        key = "-".join([stage, *(f"{name}_{value}" for name, value in options.items())])
        if key not in made:
            made[key] = run.parent / "exports" / key
            export(str(run), stage, to=made[key], **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def sharded(exported: Callable[..., Path]) -> Path:
    return exported("ppo", merge=True, shard="300KB")
