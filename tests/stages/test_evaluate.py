"""The evaluate stage on ranks: what it tests, the same numbers on any number of ranks, nothing measured twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.evaluate.kept import SCORES
from tests.stages.test_merge import SFT
from tests.stages.test_pretrain import recipe
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"
COMPARE = {
    "kind": "evaluate",
    "model": "sft",
    "against": "base",
    "prompts": [{"path": str(tiny.QUICKSTART / "prompts.jsonl"), "limit": 400}],
    "rows": 20,
    "micro_batch": 2,
    "sampling": {"max_prompt_length": 32, "max_response_length": 8},
}


@pytest.fixture(scope="module")
def run(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the stage `sft` and its comparison with the base, and two that name the same adapter and base by folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    by_folder = {
        "model": {"model": str(folder / "run" / "sft" / "output")},
        "against": {"model": str(tiny_llama)},
    }
    stages = {"sft": SFT, "compare": COMPARE, "outside": {**COMPARE, **by_folder}}
    recipe(folder, tiny_llama, stages)
    for stage in stages:
        evaluate(ranks, folder / "run", stage)
    return folder / "run"


def evaluate(ranks: Get, run: Path, stage: str = "compare", world: int = 2) -> dict[str, bytes]:
    """Run a stage; the files it published."""
    ranks(world).call(RUN, recipe=str(run.parent / "domain.yaml"), stage=stage, run_dir=str(run))
    return {p.name: p.read_bytes() for p in (run / stage / "output").iterdir() if p.name != "manifest.json"}


def scores(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / SCORES).iterdir()}


def again(run: Path, folder: Path) -> Path:
    """The run as it was before its comparison, with what was measured."""
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("compare", "outside"))
    shutil.copy(run.parent / "domain.yaml", folder)
    return folder / "run"


def published(run: Path, stage: str = "compare") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / stage / "output").iterdir() if p.name != "manifest.json"}


def test_a_model_from_outside_is_the_stage_that_made_it(run: Path) -> None:
    assert published(run, "outside") == published(run)
    manifest = json.loads((run / "outside" / "output" / "manifest.json").read_text())
    assert set(manifest["inputs"]["outside"]) == {"model", "against"}


def test_the_same_numbers_on_one_rank(ranks: Get, run: Path, tmp_path: Path) -> None:
    alone = again(run, tmp_path)
    shutil.rmtree(alone / SCORES)
    assert evaluate(ranks, alone, world=1) == published(run)


def test_what_was_measured_is_not_measured_again(ranks: Get, run: Path, tmp_path: Path) -> None:
    """A reply that is changed in the file comes out changed: no model was asked for it."""
    later = again(run, tmp_path)
    for file in (later / SCORES).iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for records in (batch for line in lines for batch in line):
            records[0]["reply"] = "kept"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [json.loads(line) for line in evaluate(ranks, later)["samples.jsonl"].splitlines()]
    assert sum(row["after"] == "kept" for row in rows) == 10


def test_an_interrupted_stage_goes_on(ranks: Get, run: Path, tmp_path: Path) -> None:
    """A file whose last line was not written whole: the rest is measured, to the same bytes."""
    later = again(run, tmp_path)
    for file in (later / SCORES).iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    assert evaluate(ranks, later) == published(run)
    assert (
        sum(scores(later)[name] == whole for name, whole in scores(run).items()) == 2
    )  # those of the other stage are not


def test_another_vocabulary_is_refused(ranks: Get, run: Path, test_data: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = {**COMPARE, "against": {"model": str(test_data / "stories260K")}}
    later = again(run, tmp_path)
    recipe(
        tmp_path,
        json.loads((run / "sft/output/adapter_config.json").read_text())["base_model_name_or_path"],
        {"sft": SFT, "compare": other},
    )
    with pytest.raises(AssertionError, match="another vocabulary"):
        evaluate(ranks, later)
