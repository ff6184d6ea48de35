"""Kill a rank in the middle of each of the stages without a reward model, run it again: every published file is the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import chain
from tests.faults.test_resume import assert_same_files, wait_for_step
from tests.stages.test_pretrain import DOMAIN, recipe
from tests.support import tiny
from tests.support.session import Ranks

RUN = "tests.support.stages:run"
LONG = {"steps": 20, "batch": 8, "micro_batch": 2, "lr": 1e-3, "save_every": 3, "log_every": 1, "eval_rows": 8}
PAIRS = [{"path": str(tiny.QUICKSTART / "preferences.jsonl"), "limit": 100}]
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {**LONG, "kind": "pretrain", "data": [{"path": str(DOMAIN / "tales.jsonl")}], "max_length": 64},
    "dpo": {**LONG, "kind": "dpo", "init": "pretrain", "data": PAIRS, "deepspeed": {"config": "zero3"}},
    "kto": {
        **LONG,
        "kind": "kto",
        "data": [{"path": "replies.jsonl"}],
        "adapter": {"method": "full"},
    },
    "distill": {
        **LONG,
        "kind": "distill",
        "init": "pretrain",
        "teacher": "dpo",
        "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl"), "limit": 100}],
        "sampling": {"max_prompt_length": 32, "max_response_length": 8},
    },
}


def test_killed_in_every_stage(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    """SIGKILL of rank 1 after a checkpoint; then the same stage again, in other processes."""
    rows = [json.loads(line) for line in (tiny.QUICKSTART / "preferences.jsonl").read_text().splitlines()[:50]]
    replies = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    path, undisturbed, run = str(recipe(tmp_path, tiny_llama, STAGES)), tmp_path / "undisturbed", tmp_path / "run"
    ranks(2).call("tests.support.stages:chain", recipe=path, run_dir=str(undisturbed))
    for stage in STAGES:
        doomed = Ranks(2, tmp_path / f"ranks-{stage}")
        pids = doomed.call("os:getpid")
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(doomed.call, RUN, recipe=path, stage=stage, run_dir=str(run))
            wait_for_step(run, stage, 7, doomed.process)
            os.kill(pids[1], signal.SIGKILL)
            with pytest.raises(AssertionError, match=r"no answer from every rank|by peer"):
                running.result()
        assert not (run / stage / "output").exists()
        assert 3 <= chain.checkpoints(run / stage)[-1] < 20
        ranks(2).call(RUN, recipe=path, stage=stage, run_dir=str(run))
        assert_same_files(run, undisturbed, stage)
