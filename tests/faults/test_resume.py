"""Kill a rank in the middle of each stage, ask a run to stop, run again: every published file equals the undisturbed run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support import tiny
from tests.support.session import Ranks

SLOW = {
    "stages__sft__steps": 40,
    "stages__reward__steps": 40,
    "stages__ppo__steps": 20,
    "stages__sft__save_every": None,
    "stages__reward__save_every": 5,
    "stages__ppo__save_every": 4,
    "adapter__dropout": 0.1,
    "stages__sft__eval_every": 5,
    "stages__sft__publish": "best",
    "stages__ppo__eval_every": 4,
    "stages__ppo__publish": "best",
    "stages__ppo__kl": {"coef": 0.1, "target": 1.0, "horizon": 100},
}


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    relay = Path(sys.executable).parent / "relay"
    return subprocess.Popen(
        [str(relay), "run", str(recipe), "--run-dir", str(run)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_step(run: Path, stage: str, step: int, process: subprocess.Popen[str], timeout: float = 240.0) -> None:
    """Until the stage has logged `step`."""
    limit, metrics = time.monotonic() + timeout, run / stage / "metrics.jsonl"
    while time.monotonic() < limit:
        if metrics.exists():
            lines = metrics.read_text().splitlines()
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                return
        assert process.poll() is None, (
            f"{stage} ended before step {step}:\n{process.stdout.read() if process.stdout else ''}"
        )
        time.sleep(0.02)
    raise AssertionError(f"{stage} did not reach step {step}")


def ranks_of(run: Path) -> list[psutil.Process]:
    """The rank processes of a run, in rank order."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if (
            str(run) in line
            and "-m" in line
            and any(a.startswith("stages.") for a in line)
            and "deepspeed.launcher.launch" not in line
        ):
            found.append(process)
    return sorted(found, key=lambda p: next(a for a in p.info["cmdline"] if a.startswith("--local_rank")))


def assert_same_files(run: Path, undisturbed: Path, stage: str) -> None:
    ours, theirs = run / stage / "output", undisturbed / stage / "output"
    names = {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()}
    assert names == {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()}
    for name in sorted(names):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{stage}/output/{name} differs"


@pytest.mark.launch
def test_killed_in_every_stage(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    """SIGKILL of `relay run` in SFT, of rank 1 in the reward model's stage, of all ranks in PPO, and SIGTERM to `relay run`
    there; then the same command to the end."""
    recipe = tiny.recipe(tmp_path / "tiny.yaml", tiny_llama, **SLOW)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(undisturbed))

    for stage, step, code in (("sft", 13, -signal.SIGKILL), ("reward", 13, 1), ("ppo", 7, 1)):
        process = start(recipe, run)
        wait_for_step(run, stage, step, process)
        for pid in {
            "sft": [process.pid],
            "reward": [ranks_of(run)[1].pid],
            "ppo": [rank.pid for rank in ranks_of(run)],
        }[stage]:
            os.kill(pid, signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == code, output
        assert stage == "sft" or "a process of the job was ended by SIGKILL" in output
        assert not (run / stage / "output").exists()
        assert psutil.wait_procs(ranks_of(run), timeout=5)[1] == [], "a rank outlived the job"

    process = start(recipe, run)
    wait_for_step(run, "ppo", 10, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert (run / "ppo" / "checkpoints").is_dir()
    assert not (run / "ppo" / "output").exists()

    process = start(recipe, run)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    for stage in ("sft", "reward", "ppo"):
        assert_same_files(run, undisturbed, stage)
    steps = [
        json.loads(line)["step"] for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert steps == list(range(1, 21)), "metrics must read as one undisturbed run"
