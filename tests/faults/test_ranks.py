"""A rank that raises, hangs or finds no memory: the job ends in bounded time, with that rank's error alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import checkpoint, faults
from pipeline.launch import free_port
from tests.faults.test_resume import ranks_of
from tests.support import tiny

TIMEOUT = 8
"""Seconds without progress after which a job ends that is to hang; starting takes less once DeepSpeed's parts are built."""

FAULTY = """
import os, pathlib, time
from torch.optim.optimizer import register_optimizer_step_pre_hook
fault = pathlib.Path(__file__).with_name('fault').read_text()
steps = [0]
def before_step(*_):
    steps[0] += 1
    if steps[0] == 5 and os.environ['RANK'] == '1':
        if fault == 'raises':
            raise KeyError('a mistake of one rank')
        if fault == 'hangs':
            time.sleep(3600)
register_optimizer_step_pre_hook(before_step)
def score(prompts, responses, rows):
    return [float(len(r)) for r in responses]
"""


@dataclass
class Job:
    """A PPO of two ranks of which rank 1 does in its fifth update what the file `fault` says."""

    folder: Path
    recipe: Path

    def start(self, fault: str, timeout: int = 600) -> subprocess.Popen[str]:
        (self.folder / "fault").write_text(fault)
        more = ["--set", f"deepspeed.timeout={timeout}"]
        relay = Path(sys.executable).parent / "relay"
        return subprocess.Popen(
            [str(relay), "run", str(self.recipe), "--run-dir", str(self.run), "--until", "ppo", *more],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    @property
    def run(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "reward_with_faults.py").write_text(FAULTY)
    recipe = tiny.recipe(
        folder / "tiny.yaml",
        tiny_llama,
        data__holdout=0.0,
        stages__ppo__reward=[{"function": "reward_with_faults:score"}],
        stages__ppo__critic={"init": "policy"},
        stages__ppo__policy="base",
        stages__ppo__steps=20,
        stages__ppo__save_every=1,
    )
    yield Job(folder, recipe)
    assert ranks_of(folder / "run") == [], "a rank outlived its job"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("fault", "says", "unsaid"),
    [
        ("raises", ["rank 1 of 2 failed", "KeyError", "a mistake of one rank"], ["rank 0 of 2"]),
        ("hangs", [f"rank 1 of 2: no progress for {TIMEOUT} s", "time.sleep(3600)"], ["Traceback", "rank 0 of 2"]),
    ],
)
def test_fault_of_one_rank(job: Job, fault: str, says: list[str], unsaid: list[str]) -> None:
    process = job.start(fault, TIMEOUT if fault == "hangs" else 600)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    for text in says:
        assert text in output
    for text in unsaid:
        assert text not in output
    saved = job.run / "ppo" / "checkpoints"
    assert [checkpoint.damage(p) for p in saved.glob("step-*")] == [None]


@pytest.mark.fast
def test_memory_that_is_not_there(tmp_path: Path) -> None:
    for ask in (lambda: torch.empty(2**50), lambda: np.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        trouble = str(faults.machine(caught.value, tmp_path))
        assert trouble.startswith("out of memory: ")
        assert "lower micro_batch" in trouble
    assert faults.machine(KeyError("memory"), tmp_path) is None


JOINING = """
import signal
from pipeline import engine
signal.signal(signal.SIGTERM, lambda *_: None)  # as a stage has it, which saves at its next step
print("joins", flush=True)
engine.start(0)
"""


@pytest.mark.alone
def test_rank_that_waits_for_one_that_never_comes() -> None:
    """The launcher ends it by SIGTERM, which torch's wait for the others would hold back."""
    env = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    rank = subprocess.Popen(
        [sys.executable, "-c", JOINING],
        env={**os.environ, **env, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "joins\n"
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(timeout=4)
    rank.terminate()
    try:
        assert rank.wait(timeout=10) == -signal.SIGTERM
    finally:
        rank.kill()
        rank.communicate()
