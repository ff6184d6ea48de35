"""Relay's side of a benchmark: the PPO stage as the recipe says, one step per turn.

python relay_side.py RECIPE RUN_DIR [--set KEY=VALUE ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import cast

import torch
import turns

from pipeline.config.schema import Ppo
from pipeline.launch import free_port
from pipeline.stage import Context, execute
from stages.ppo.__main__ import prepare
from stages.ppo.train import Clock


def program(context: Context) -> None:
    loop = prepare(context, cast(Ppo, context.block)).loop
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for step, done in enumerate(turns.told()):
        clock = Clock()
        batch = loop.collect(step, clock)
        with clock.phase("train"):
            metrics = loop.learn(batch, step)
        done(
            phases=clock.seconds,
            length=metrics["objective/length"],
            padding=metrics["perf/padding_share"],
            kl=metrics["objective/kl"],
        )


def run() -> None:
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    overrides = [value for flag, value in zip(sys.argv[3::2], sys.argv[4::2], strict=True) if flag == "--set"]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    execute(program, sys.argv[1], "ppo", Path(sys.argv[2]), overrides, rank, world)


if __name__ == "__main__":
    run()
