"""Which stages run, in which order, which are already done, and why."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import handoff
from pipeline.config.recipe import (
    DS_CONFIGS,
    Recipe,
    deepspeed_config,
    digest,
    elsewhere,
    functions,
    outside,
    resolved,
    sources,
)
from pipeline.config.tokens import template_file
from pipeline.data.read import file_hash
from pipeline.data.split import fingerprints
from pipeline.errors import UserError

REDO = "REDO"
"""A file of this name in a stage's folder: `--from` asked for it again, and it has not been published since."""


@dataclass(frozen=True)
class State:
    """`done`: the published output fits the recipe; `why` says what is missing or changed otherwise."""

    stage: str
    done: bool
    why: str


SHIPPED_CONFIGS = frozenset(path.stem for path in DS_CONFIGS.glob("*.json"))


def inputs(recipe: Recipe, stage: str, run_dir: Path) -> dict[str, Any]:
    """Everything that decides a stage's output: its block, its base, its data, its parents' contents.

    Parents must be published. Two equal records mean the same work.
    """
    block = recipe.stages[stage]
    parents = {}
    for parent in recipe.parents(stage):
        manifest = handoff.read_manifest(run_dir / parent)
        if manifest is None:
            raise UserError(
                recipe.where("stages", stage),
                f'its upstream stage "{parent}" is not published in {run_dir}',
                expected="a finished upstream stage",
                fix=f"run it first: relay run {recipe.name} --until {parent}",
            )
        parents[parent] = manifest["content_hash"]
    for part in elsewhere(block):
        baton = handoff.elsewhere(recipe, str(part.run), part.stage)
        parents[part.name] = baton.content_hash if baton else None
    return {
        "block": resolved(block),
        "base": handoff.model_hash(recipe.local(block.base.model), block.base.revision) if block.base else None,
        "data": fingerprints(recipe, stage, parents),
        "shares": [recipe.interval(stage, source) for source in sources(recipe.stages[stage])],
        "parents": parents,
        "deepspeed": None if block.deepspeed.config in SHIPPED_CONFIGS else digest(deepspeed_config(recipe, stage)),
        "functions": {name: _source_hash(name) for name in functions(block)},
        "outside": {key: handoff.outside_hash(recipe.local(item.model), item.revision) for key, item in outside(block)},
        **({"chat_template": file_hash(template)} if (template := template_file(recipe, stage)) else {}),
    }


def _source_hash(function: str) -> str | None:
    """Hash of the module file that a `package.module:function` lies in; a changed rule is other work."""
    try:
        spec = importlib.util.find_spec(function.partition(":")[0])
    except Exception:  # importing the package around it may fail in any way; the stage itself says how
        return None
    return file_hash(Path(spec.origin)) if spec and spec.origin and Path(spec.origin).is_file() else None


def key(record: dict[str, Any]) -> str:
    """A short name of an `inputs` record; checkpoints carry it so that they are only resumed by the same work."""
    return digest(record)[:12]


def work(record: dict[str, Any]) -> str:
    """A short name of what an `inputs` record computes, however many devices share it: ranks, DeepSpeed configuration and
    micro-batch are left out. A training that was interrupted goes on under another of these sizes."""
    block = {name: value for name, value in record["block"].items() if name not in ("deepspeed", "micro_batch")}
    return key({**record, "block": block, "deepspeed": None})


def state(recipe: Recipe, stage: str, run_dir: Path) -> State:
    """Whether `stage` must run, and why."""
    manifest = handoff.read_manifest(run_dir / stage)
    waiting = [p for p in recipe.parents(stage) if not state(recipe, p, run_dir).done]
    if waiting:
        return State(stage, False, f"waits for {', '.join(waiting)}")
    if manifest is None:
        steps = checkpoints(run_dir / stage)
        return State(stage, False, f"interrupted; resumes from step {steps[-1]}" if steps else "not run yet")
    if (run_dir / stage / REDO).exists():
        return State(stage, False, "asked to run again, and not finished since")
    changed = differences(manifest["inputs"], _plain(inputs(recipe, stage, run_dir)))
    if changed:
        return State(stage, False, "changed: " + ", ".join(changed[:4]) + (", …" if len(changed) > 4 else ""))
    return State(stage, True, f"up to date ({manifest['content_hash'][:12]})")


def checkpoints(stage_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a stage, ascending."""
    found = []
    for marker in stage_dir.glob("checkpoints/*-*/COMPLETE.json"):
        step = marker.parent.name.rpartition("-")[2]
        if step.isdigit():
            found.append(int(step))
    return sorted(found)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values when they are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for k in sorted(old.keys() | new.keys())
            for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)
        ]
    if old == new:
        return []
    name = path.removeprefix("block.")
    short = all(len(str(v)) <= 24 for v in (old, new))
    return [f"{name} {old} -> {new}" if short else name]


def _plain(record: dict[str, Any]) -> Any:
    """As JSON gives it back, so that tuples equal lists."""
    return json.loads(json.dumps(record))


def selection(recipe: Recipe, first: str | None, until: str | None) -> list[str]:
    """The stages `--from` and `--until` leave, in order. `--until X` keeps X and its upstream."""
    for option, name in (("--from", first), ("--until", until)):
        if name is not None and name not in recipe.stages:
            raise UserError(f"{option} {name}", "no such stage", expected="one of: " + ", ".join(recipe.stages))
    if first and until and first != until and first not in _ancestors(recipe, until):
        raise UserError(
            f"--from {first} --until {until}",
            f"{first} does not come before {until}",
            expected="a stage that --until waits for",
            fix="leave out one of them",
        )
    order = recipe.order()
    if until is not None:
        order = [s for s in order if s == until or s in _ancestors(recipe, until)]
    return order


def _ancestors(recipe: Recipe, stage: str) -> set[str]:
    found: set[str] = set()
    for parent in recipe.parents(stage):
        found |= {parent} | _ancestors(recipe, parent)
    return found


def redo(recipe: Recipe, first: str | None) -> set[str]:
    """The stages that `--from` runs again although they are up to date: the named one and all that depends on it."""
    if first is None:
        return set()
    return {s for s in recipe.stages if s == first or first in _ancestors(recipe, s)}
