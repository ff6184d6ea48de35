"""What a check finds: one line, and the fix where something is amiss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline import launch
from pipeline.config.recipe import Recipe

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`warn`: a recipe may still run, or only some need it. `fail`: what the case wants will not work."""

    check: str
    state: State
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "warn", found, fix)


def fail(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "fail", found, fix)


@dataclass(frozen=True)
class Case:
    """What is examined: this machine, for `recipe` or for any; `run_dir` need not be there yet."""

    recipe: Recipe | None
    run_dir: Path

    @cached_property
    def gpus(self) -> int | None:
        """GPUs that ranks may use; None where they run on the CPU."""
        return launch.devices()

    @property
    def ranks(self) -> int:
        """Ranks on this host: the recipe's most; without a recipe one per GPU, or two on the CPU."""
        if self.recipe is not None:
            return max(block.deepspeed.num_gpus for block in self.recipe.stages.values())
        return self.gpus or 2

    def wants(self, quality: Callable[..., object]) -> bool:
        """Whether some stage's block has `quality`; any recipe may, where none is given."""
        return self.recipe is None or any(quality(block) for block in self.recipe.stages.values())


Check = Callable[[Case], list[Finding]]
