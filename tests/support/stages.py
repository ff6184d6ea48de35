"""Run a stage's program in a warm rank, as the launcher would in a fresh one."""

from __future__ import annotations

import gc
import importlib
import os
from pathlib import Path

PROGRAMS = {
    "sft": "stages.sft:sft",
    "pretrain": "stages.pretrain:pretrain",
    "merge": "stages.merge:merge",
    "export": "stages.export:export",
    "reward": "stages.reward:reward",
    "ppo": "stages.ppo.__main__:ppo",
    "evaluate": "stages.evaluate.__main__:evaluate",
    "selection": "stages.selection.__main__:selection",
    "dpo": "stages.preference.__main__:preference",
    "kto": "stages.preference.__main__:preference",
    "classify": "stages.classify:classify",
    "distill": "stages.distill.__main__:distill",
}


def run(recipe: str, stage: str, run_dir: str, overrides: list[str] | None = None) -> str:
    """The content hash that the stage published. Runs on every rank."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from pipeline import handoff
    from pipeline.config.recipe import load
    from pipeline.stage import execute

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks = [f"deepspeed.num_gpus={world}"]
    kind = load(recipe, [*(overrides or []), *ranks]).stages[stage].kind
    module, _, name = PROGRAMS[kind].partition(":")
    try:
        execute(
            getattr(importlib.import_module(module), name),
            recipe,
            stage,
            Path(run_dir),
            [*(overrides or []), *ranks],
            rank,
            world,
        )
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        unset_hf_deepspeed_config()  # a trainer of ZeRO-3 that still lives would shard the next stage's models
        gc.collect()
    barrier()
    manifest = handoff.read_manifest(Path(run_dir) / stage)
    assert manifest is not None
    return str(manifest["content_hash"])


def stopped(recipe: str, stage: str, run_dir: str) -> bool:
    """Whether the stage, run as above, saved and stopped before its end."""
    from pipeline.stage import Stopped

    try:
        run(recipe, stage, run_dir)
    except Stopped:
        return True
    return False


def refused(recipe: str, stage: str, run_dir: str) -> str:
    """What the stage says, on every rank, as it ends with an error that it tells in a paragraph."""
    from pipeline.errors import Trouble, UserError

    try:
        run(recipe, stage, run_dir)
    except (UserError, Trouble) as error:
        barrier()
        return str(error)
    raise AssertionError(f"{stage} was not refused")


def told(recipe: str, stage: str, run_dir: str) -> str:
    """What the machine's fault that ends the stage is told as; empty when there is none."""
    from pipeline import faults

    try:
        run(recipe, stage, run_dir)
    except Exception as error:
        trouble = faults.machine(error, Path(run_dir))
        if trouble is None:
            raise
        return str(trouble)
    return ""


def chain(recipe: str, run_dir: str, overrides: list[str] | None = None, until: str | None = None) -> dict[str, str]:
    """Run all stages of a recipe in order; content hash by stage."""
    from pipeline.config.recipe import load

    hashes = {}
    for stage in load(recipe, overrides).order():
        hashes[stage] = run(recipe, stage, run_dir, overrides)
        if stage == until:
            break
    return hashes


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
