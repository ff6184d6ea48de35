"""A run that goes wrong by itself: exit code 3, the step named, the batch saved, the last good checkpoint kept and used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.report.read import read_run
from tests.support import tiny
from tests.support.session import Ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.launch
def test_reward_that_fails_later(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    """The reward is infinite from the fourth rollout on: code 3, and the checkpoint of step 3 is there. Once the cause is gone
    (a file; the function itself stays, for another one would be other work) the same command goes on from step 3."""
    module = tmp_path / "reward_under_test.py"
    module.write_text(
        "import math, pathlib\n"
        "calls = [0]\n"
        "def score(prompts, responses, rows):\n"
        "    calls[0] += 1\n"
        "    fine = calls[0] <= 3 or pathlib.Path(__file__).with_name('mended').exists()\n"
        "    return [float(len(r)) if fine else math.inf for r in responses]\n"
    )
    recipe = tiny.recipe(
        tmp_path / "tiny.yaml",
        tiny_llama,
        data__holdout=0.0,
        stages__ppo__reward=[{"function": "reward_under_test:score"}],
        stages__ppo__critic={"init": "policy"},
        stages__ppo__policy="base",
        stages__ppo__steps=5,
        stages__ppo__save_every=1,
    )
    run = tmp_path / "run"
    command = [str(Path(sys.executable).parent / "relay"), "run", str(recipe), "--run-dir", str(run), "--until", "ppo"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    first = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert first.returncode == 3, first.stdout + first.stderr
    said = first.stdout + first.stderr
    assert "stage ppo, step 4: " in said
    assert "function:reward_under_test:score" in said
    assert "Traceback" not in said
    assert read_run(run)["stages"]["ppo"]["why"].startswith("stage ppo, step 4: ")
    assert "stage ppo, step 4: " in (run / "report.html").read_text()
    saved = torch.load(run / "ppo" / "trouble" / "step-4.pt", weights_only=True)
    assert saved["tokens"].shape[0] == 8, "the rollout of both ranks"
    assert [p.name for p in (run / "ppo" / "checkpoints").glob("step-*")] == ["step-3"]
    assert not (run / "ppo" / "output").exists()

    (tmp_path / "mended").touch()
    again = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [
        line.split('"step": ')[1].split(",")[0] for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == ["1", "2", "3", "4", "5"]
    view = read_run(run)
    ppo = view["stages"]["ppo"]
    assert (ppo["state"], ppo["launches"], view["stages"]["reward"]["state"]) == ("done", 2, "not run")
    assert view["command"][1:] == command[1:]
