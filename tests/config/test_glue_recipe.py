"""The glue recipe, its options on the command line, and what they refuse: in under two seconds and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import memory
from pipeline.config.glue import TASKS
from pipeline.config.recipe import load
from pipeline.config.schema import Classify
from pipeline.config.shortcuts import shortcuts
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "configs"


def relay(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    env = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    return done, time.monotonic() - began


def block(**changes: Any) -> Classify:
    found = load("glue", [f"stages.glue.{key}={value}" for key, value in changes.items()]).stages["glue"]
    assert isinstance(found, Classify)
    return found


def test_every_task_of_both_suites_is_there() -> None:
    glue = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    super_glue = {"boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc", "axb", "axg"}
    assert {name for name, task in TASKS.items() if task.suite == "glue"} == glue
    assert {name for name, task in TASKS.items() if task.suite == "super_glue"} == super_glue
    assert [block(task=name).task for name in TASKS] == list(TASKS)


@pytest.mark.alone
def test_an_unknown_task_is_refused_at_once_and_the_tasks_are_named() -> None:
    tries = [relay("run", "glue", "--task", "nope") for _ in range(2)]
    for done, _ in tries:
        assert done.returncode == 2
        assert "stages.glue.task: found 'nope'" in done.stderr
        assert all(task in done.stderr for task in TASKS)
        assert "Traceback" not in done.stderr
    assert min(seconds for _, seconds in tries) < 2.0


def test_a_task_without_public_labels_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="labels are not public"):
        load("glue", ["stages.glue.task=ax"])


def test_options_stand_for_overrides(tmp_path: Path) -> None:
    given = shortcuts("glue", "rte", "full", tmp_path)
    assert given == [
        "name=glue-rte-full",
        "stages.glue.task=rte",
        f"stages.glue.data={tmp_path}",
        "adapter.method=full",
    ]
    recipe = load("glue", given)
    assert recipe.name == "glue-rte-full"
    assert recipe.stages["glue"].adapter.method == "full"
    assert load("glue", shortcuts("glue", "sst2", "mam", None)).stages["glue"].adapter.method == "mam"
    assert shortcuts("glue", None, None, None) == []


def test_a_folder_that_yaml_would_take_for_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "a: b #1"
    found = load("glue", shortcuts("glue", None, None, folder)).stages["glue"]
    assert isinstance(found, Classify)
    assert found.data == str(folder)


def test_options_are_refused_where_they_change_nothing(tmp_path: Path) -> None:
    for option in (["--task", "rte"], ["--data", str(tmp_path)]):
        done, _ = relay("run", "quickstart", *option)
        assert done.returncode == 2
        assert f"{option[0]} {option[1]}: recipe quickstart has no stage of kind classify" in done.stderr
        assert "relay run glue" in done.stderr
    recipe = tmp_path / "own.yaml"
    recipe.write_text("{name: own, base: {model: m}, stages: {glue: {kind: classify, adapter: {method: lora}}}}")
    with pytest.raises(UserError, match=r"stage glue of recipe .* has a method of its own: lora"):
        shortcuts(str(recipe), None, "full", None)


def test_missing_files_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    done, _ = relay("run", "glue", "--task", "mnli", "--data", str(tmp_path), "--run-dir", run)
    assert done.returncode == 2
    assert f"stages.glue.data: no train.tsv of mnli in {tmp_path}" in done.stderr
    assert "MNLI/train.tsv, MNLI/dev_matched.tsv, MNLI/dev_mismatched.tsv" in done.stderr
    done, _ = relay("run", "glue", "--data", str(tmp_path / "absent"), "--run-dir", run)
    assert f"no folder {tmp_path / 'absent'}" in done.stderr


def test_evaluation_needs_no_held_out_share() -> None:
    assert load("glue", ["data.holdout=0", "stages.glue.eval_every=10"]).stages["glue"].holdout == 0


def test_plan_counts_a_head_of_as_many_rows_as_classes() -> None:
    """Qwen2.5-0.5B: LoRA of rank 16 on every linear layer, and a head of 896 weights for each class."""
    lora = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    for task, outputs in (("stsb", 1), ("rte", 2), ("mnli", 3)):
        need = memory.estimate(load("glue", [f"stages.glue.task={task}"]), "glue", CONFIGS)
        assert need.trained == lora + outputs * 896
        assert need.parameters == 494_032_768
        assert need.phases["backward"].logits == 0
    done, _ = relay("plan", "glue", "--task", "mnli", "--configs", str(CONFIGS), "--device-memory", "80")
    assert done.returncode == 0, done.stderr
    assert "glue (classify)" in done.stdout
    assert "--module stages.classify" in done.stdout
    assert "--set stages.glue.task=mnli" in done.stdout
