"""A folder in which what the pages tell to type can be typed: with a run of the quickstart, shortened, and called `hh` too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import records
from pipeline.config.recipe import load, written
from tests.support.session import Ranks

SHORT = [
    *(f"stages.{stage}.data=[{{path: quickstart/{file}.jsonl, limit: 200}}]" for stage, file in
      (("sft", "demonstrations"), ("reward", "preferences"))),
    *(f"stages.{stage}.prompts=[{{path: quickstart/prompts.jsonl, limit: 200}}]" for stage in ("ppo", "evaluate")),
    *(f"stages.{stage}.{key}" for stage in ("sft", "reward") for key in
      ("steps=2", "batch=8", "log_every=1", "eval_every=1", "eval_rows=16")),
    *(f"stages.ppo.{key}" for key in ("steps=2", "rollout_batch=8", "eval_every=1", "eval_rows=4")),
    "stages.ppo.sampling.max_response_length=8",
    "stages.evaluate.rows=8",
    "stages.evaluate.sampling.max_response_length=8",
]  # fmt: skip


@pytest.fixture(scope="session")
def quickstart(ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run of the quickstart, of two steps a stage."""
    folder = tmp_path_factory.mktemp("docs") / "quickstart"
    recipe = load("quickstart", SHORT)
    folder.mkdir(mode=0o700)
    records.begin(folder, recipe, written(recipe.path, SHORT), ["relay", "run", "quickstart"])
    ranks(2).call("tests.support.stages:chain", recipe="quickstart", run_dir=str(folder), overrides=SHORT)
    return folder


@pytest.fixture
def place(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody who reads a page."""
    (tmp_path / "runs").mkdir()
    for name in ("quickstart", "hh"):
        (tmp_path / "runs" / name).symlink_to(quickstart)
    monkeypatch.chdir(tmp_path)
    return tmp_path
