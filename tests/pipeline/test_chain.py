"""Which stages run, which are done, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import chain, checkpoint, handoff
from pipeline.chain import State, differences
from pipeline.config.recipe import Recipe, load
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

RECIPE = """
name: two
base: {model: base, dtype: fp32}
deepspeed: {config: zero0}
stages:
  sft: {kind: sft, data: [{path: demonstrations.jsonl}], lr: 1.0e-3, batch: 2}
  again: {kind: sft, init: sft, data: [{path: more.jsonl}], lr: 1.0e-4, batch: 2}
"""
FAN = """
name: fan
base: {model: base}
stages:
  evaluate: {kind: evaluate, model: ppo, against: sft, reward: [reward], prompts: [{path: demonstrations.jsonl}]}
  sft: {kind: sft, data: [{path: demonstrations.jsonl}], lr: 1.0e-3}
  ppo: {kind: ppo, policy: sft, reward: reward, prompts: [{path: demonstrations.jsonl}], steps: 2, lr: 1.0e-5}
  reward: {kind: reward, data: [{path: pairs.jsonl}], lr: 1.0e-3}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe of two stages, a fake base model and data."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "base" / "config.json").write_text("{}", encoding="utf-8")
    for name in ("demonstrations.jsonl", "more.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "yes"}) + "\n", encoding="utf-8")
    (tmp_path / "two.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "fan.yaml").write_text(FAN, encoding="utf-8")
    return tmp_path


def recipe(project: Path, *overrides: str) -> Recipe:
    return load(project / "two.yaml", list(overrides))


def publish(loaded: Recipe, stage: str, run_dir: Path, weights: bytes = b"trained") -> None:
    """What a finished stage leaves behind, without training."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(weights + stage.encode())

    inputs = chain.inputs(loaded, stage, run_dir)
    handoff.publish(run_dir / stage, write, {"stage": stage, "inputs": inputs, "parents": inputs["parents"]})


def states(loaded: Recipe, run_dir: Path) -> list[str]:
    """What is said of both stages; done ones as `done`."""
    found = [chain.state(loaded, stage, run_dir) for stage in loaded.order()]
    return ["done" if state.done else state.why for state in found]


@pytest.fixture
def run_dir(project: Path) -> Path:
    """A run whose two stages are done."""
    for stage in ("sft", "again"):
        publish(recipe(project), stage, project / "run")
    return project / "run"


# From nothing to done.


def test_states_of_a_run_from_nothing_to_done(project: Path) -> None:
    loaded, run_dir = recipe(project), project / "run"
    assert states(loaded, run_dir) == ["not run yet", "waits for sft"]
    publish(loaded, "sft", run_dir)
    assert states(loaded, run_dir) == ["done", "not run yet"]
    publish(loaded, "again", run_dir)
    assert states(loaded, run_dir) == ["done", "done"]
    content = handoff.open_baton(run_dir / "sft").content_hash
    assert chain.state(loaded, "sft", run_dir) == State("sft", True, f"up to date ({content[:12]})")


def test_an_interrupted_stage_says_where_it_resumes(project: Path) -> None:
    for step in (5, 10, 9):
        folder = project / "run" / "sft" / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        if step != 10:
            checkpoint.complete(folder, {"step": step})
    assert states(recipe(project), project / "run")[0] == "interrupted; resumes from step 9"
    assert chain.checkpoints(project / "run" / "sft") == [5, 9]


def test_inputs_need_published_parents(project: Path) -> None:
    with pytest.raises(UserError, match=r'its upstream stage "sft" is not published in .*\n.*\n  fix: .*--until sft'):
        chain.inputs(recipe(project), "again", project / "run")


# What makes a stage run again.


def test_a_changed_key_is_named_and_stops_at_its_stage(project: Path, run_dir: Path) -> None:
    assert states(recipe(project, "stages.again.lr=2.0e-4"), run_dir) == ["done", "changed: lr 0.0001 -> 0.0002"]
    assert states(recipe(project, "stages.sft.lr=2.0e-3"), run_dir) == ["changed: lr 0.001 -> 0.002", "waits for sft"]


def test_inherited_keys_count(project: Path, run_dir: Path) -> None:
    changed = states(recipe(project, "adapter.r=8", "seed=3"), run_dir)
    assert changed == ["changed: adapter.r 16 -> 8, seed 0 -> 3", "waits for sft"]
    assert states(recipe(project, "stages.again.deepspeed.config=zero2"), run_dir) == [
        "done",
        "changed: deepspeed.config zero0 -> zero2",
    ]


def test_many_changes_are_cut(project: Path, run_dir: Path) -> None:
    overrides = [f"stages.again.{key}" for key in ("lr=2.0e-4", "batch=4", "epochs=2", "warmup=5", "log_every=1")]
    why = states(recipe(project, *overrides), run_dir)[1]
    assert why == "changed: batch 2 -> 4, epochs 1.0 -> 2.0, log_every 10 -> 1, lr 0.0001 -> 0.0002, …"


def test_name_and_tracking_do_not_count(project: Path, run_dir: Path) -> None:
    loaded = recipe(project, "name=other", "tracking.tensorboard=true", "tracking.wandb.mode=offline")
    assert states(loaded, run_dir) == ["done", "done"]


def test_changed_data_counts_by_content(project: Path, run_dir: Path) -> None:
    data = project / "more.jsonl"
    os.utime(data, (0, 0))
    assert states(recipe(project), run_dir) == ["done", "done"]
    data.write_text(data.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert states(recipe(project), run_dir) == ["done", "changed: data"]


def test_a_changed_base_counts_by_content(project: Path, run_dir: Path) -> None:
    (project / "base" / "README.md").write_text("notes", encoding="utf-8")
    assert states(recipe(project), run_dir) == ["done", "done"]
    (project / "base" / "model.safetensors").write_bytes(b"other weights")
    assert states(recipe(project), run_dir) == ["changed: base", "waits for sft"]


def test_a_parent_that_came_out_different_counts(project: Path, run_dir: Path) -> None:
    publish(recipe(project), "sft", run_dir, weights=b"trained better")
    assert states(recipe(project), run_dir) == ["done", "changed: parents.sft"]
    publish(recipe(project), "sft", run_dir)
    assert states(recipe(project), run_dir) == ["done", "done"], "the same bytes again are the same parent"


def test_a_damaged_manifest_is_told(project: Path, run_dir: Path) -> None:
    (run_dir / "sft" / "output" / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="this manifest was altered or cut short"):
        chain.state(recipe(project), "sft", run_dir)


def test_key_names_the_work(project: Path, run_dir: Path) -> None:
    record = chain.inputs(recipe(project), "again", run_dir)
    assert chain.key(record) == chain.key(json.loads(json.dumps(record)))
    assert len(chain.key(record)) == 12
    assert chain.key(chain.inputs(recipe(project, "stages.again.seed=1"), "again", run_dir)) != chain.key(record)


# Differences.


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a 1 -> 2"]),
        ({"block": {"kl": {"coef": 0.1}}}, {"block": {"kl": {"coef": 0.2}}}, ["kl.coef 0.1 -> 0.2"]),
        ({"a": 1}, {"b": 1}, ["a 1 -> None", "b None -> 1"]),
        ({"base": "a" * 64}, {"base": "b" * 64}, ["base"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a [1, 2] -> [1, 3]"]),
        ({"a": None}, {"a": {"b": 1}}, ["a None -> {'b': 1}"]),
        ({"a": None}, {}, []),
        ({"a": False}, {"a": True}, ["a False -> True"]),
    ],
)
def test_differences_by_hand(old: Any, new: Any, expected: list[str]) -> None:
    assert differences(old, new) == expected


# Selection.


@pytest.fixture
def fan(project: Path) -> Recipe:
    return load(project / "fan.yaml")


def test_order_is_upstream_first(fan: Recipe) -> None:
    order = chain.selection(fan, None, None)
    assert sorted(order) == ["evaluate", "ppo", "reward", "sft"]
    assert order.index("sft") < order.index("ppo") < order.index("evaluate")
    assert order.index("reward") < order.index("ppo")


def test_until_keeps_a_stage_and_its_upstream(fan: Recipe) -> None:
    assert chain.selection(fan, None, "sft") == ["sft"]
    assert chain.selection(fan, None, "reward") == ["reward"]
    assert sorted(chain.selection(fan, None, "ppo")) == ["ppo", "reward", "sft"]
    assert len(chain.selection(fan, "ppo", None)) == 4, "upstream stages are still checked, and skipped when up to date"


def test_from_runs_a_stage_and_its_downstream_again(fan: Recipe) -> None:
    assert chain.redo(fan, None) == set()
    assert chain.redo(fan, "reward") == {"reward", "ppo", "evaluate"}
    assert chain.redo(fan, "ppo") == {"ppo", "evaluate"}
    assert chain.redo(fan, "evaluate") == {"evaluate"}


@pytest.mark.parametrize(
    ("select", "option"),
    [
        (lambda r: chain.selection(r, "stf", None), "--from stf"),
        (lambda r: chain.selection(r, None, "stf"), "--until stf"),
    ],
)
def test_unknown_stages_are_refused(fan: Recipe, select: Callable[[Recipe], list[str]], option: str) -> None:
    with pytest.raises(UserError, match=f"{option}: no such stage\n  expected one of: .*sft"):
        select(fan)
