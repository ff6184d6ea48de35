"""The stages that a run has published, found by the run's folder or by its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import handoff
from pipeline.config.kinds import POLICIES, REWARDS
from pipeline.config.recipe import load
from pipeline.errors import UserError
from pipeline.handoff import Baton

CLASSIFIERS = REWARDS | {"classify"}
MODELS = POLICIES | CLASSIFIERS
"""Kinds of stages whose output is a model."""


def run_folder(run: str, run_dir: Path | None = None) -> Path:
    """The folder of RUN: a run directory, the name of one in `runs`, or a recipe, whose run lies in runs/<name>."""
    for folder in [run_dir] if run_dir else [Path(run), Path("runs") / run]:
        if folder.is_dir():
            return folder
    return run_dir or Path("runs") / load(run).name


def stages(folder: Path) -> list[str]:
    """The names of the stages that published something, sorted."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(p.name for p in found if not p.name.startswith(".") and handoff.current(p).is_dir())


def open_model(folder: Path, stage: str | None, kinds: frozenset[str] = MODELS) -> Baton:
    """The verified output of `stage`, whose kind is one of `kinds`, and the base below it unchanged; without a name, that of
    the one policy that no other was made from."""
    known = stages(folder)
    if not known:
        raise UserError(
            f"run {folder}",
            "nothing is published there" if folder.is_dir() else "no such folder",
            expected="a run directory with a finished stage, or a recipe that was run",
            fix="run it first: relay run RECIPE",
        )
    name = stage if stage is not None else _last(folder, known)
    if name not in known:
        raise UserError(f"stage {name}", f"not published in {folder}", expected="one of: " + ", ".join(known))
    baton = handoff.open_baton(folder / name)
    kind = baton.manifest["kind"]
    if kind not in kinds:
        raise UserError(
            f"stage {name}",
            f"of kind {kind}, which publishes {_what(kind)}",
            expected="a stage of kind " + ", ".join(sorted(kinds)),
        )
    baton.check_base()
    return baton


def _what(kind: str) -> str:
    return "a classifier, which writes no text" if kind in CLASSIFIERS else "no model"


def _last(folder: Path, known: list[str]) -> str:
    manifests = {name: manifest(folder, name) for name in known}
    policies = {name for name in known if manifests[name]["kind"] in POLICIES}
    used = {parent for name in policies for parent in manifests[name]["parents"]}
    last = sorted(policies - used)
    if len(last) != 1:
        raise UserError(
            f"run {folder}",
            f"{len(last)} policies that no other was made from" + (f": {', '.join(last)}" if last else ""),
            expected="a stage to take",
            fix=f"add --stage, one of: {', '.join(last or known)}",
        )
    return last[0]


def manifest(folder: Path, stage: str) -> dict[str, Any]:
    """What a published stage says of itself, its files unverified."""
    found = handoff.read_manifest(folder / stage)
    assert found is not None
    return found
