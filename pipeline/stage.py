"""What every stage program does around its training: arguments, lock, inputs, parents, stop requests, errors, publishing."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import chain, checkpoint, faults, handoff, modules, records
from pipeline.config.kinds import DATA
from pipeline.config.recipe import BASE, Recipe, elsewhere, load, trusted
from pipeline.config.schema import Stage
from pipeline.data.split import Counts
from pipeline.errors import EXIT_STOPPED, UserError
from pipeline.handoff import Baton
from pipeline.launch import STOP_FILE
from pipeline.lifeline import die_with_parents
from pipeline.lock import of_a_rank, run_lock
from pipeline.report.tables import tested
from pipeline.sinks import Published
from pipeline.tracking import Tracker
from pipeline.watchdog import progress, rest, watchdog

RECORDS = ("metrics.jsonl", "samples.jsonl", "warnings.jsonl", "launches.jsonl", "wandb_run_id")
"""What a stage writes beside its checkpoints and must stay with them."""

LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "datasets", "accelerate")


class Stopped(Exception):
    """The stage saved a checkpoint and stops because it was asked to."""


@dataclass
class Context:
    """What a stage program is given: its block of the recipe, its folder, its rank, its inputs and its parents' batons."""

    recipe: Recipe
    stage: str
    run_dir: Path
    rank: int
    world_size: int
    inputs: dict[str, Any]
    batons: dict[str, Baton]
    began: float = field(default_factory=time.time)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    _signalled: bool = False
    _tracker: Tracker | None = None

    def __post_init__(self) -> None:
        self.sizes = [{"from_step": 0, **self.size}]

    @property
    def size(self) -> dict[str, Any]:
        """How the work is laid over devices: what a resume may change."""
        place = self.block.deepspeed
        return {
            "ranks": self.world_size,
            "config": Path(place.config).stem,
            "config_hash": self.inputs.get("deepspeed"),  # of a file of the user's own
            "micro_batch": getattr(self.block, "micro_batch", None),
        }

    def resumes(self, folder: Path) -> None:
        """Take over the record of sizes that `folder` holds, and say so when it was saved under another one."""
        self.sizes = checkpoint.sizes(folder, self.size)
        if checkpoint.resized(folder, self.size) and self.is_main:
            before, now = (
                f"{size['ranks']} rank{'s' * (size['ranks'] > 1)} under {size['config']}" for size in self.sizes[-2:]
            )
            print(
                f"{self.stage}  resumes step {checkpoint.step_of(folder)}, saved by {before}, on {now}; the result is not "
                "the undisturbed run's to the last bit",
                flush=True,
            )

    @property
    def block(self) -> Stage:
        return self.recipe.stages[self.stage]

    @property
    def dir(self) -> Path:
        return self.run_dir / self.stage

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def base(self) -> str:
        """The stage's base model: a folder or a hub id."""
        return self.recipe.local(self.block.base.model)

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    def parent(self, key: str) -> Baton | None:
        """The baton that key `key` of the block names; None for `base`."""
        name = getattr(self.block, key)
        return None if name == BASE else self.batons[name]

    def require_held_out(self, eval_every: int | None, held_out: int) -> None:
        """Refuse evaluation during training when no row is held out."""
        if eval_every and not held_out:
            raise UserError(
                self.recipe.where("stages", self.stage, "eval_every"),
                "no row is held out to evaluate on",
                fix="raise data.holdout, or leave out eval_every",
            )

    def tracker(self, total_steps: int, resume_step: int) -> Tracker:
        """The stage's metric stream. W&B and TensorBoard stay open for what is published, until the stage ends."""
        self._tracker = Tracker(
            self.dir,
            self.recipe.header.tracking,
            run=self.recipe.name,
            stage=self.stage,
            kind=self.block.kind,
            config={**self.inputs["block"], "parents": self.inputs["parents"]},
            total_steps=total_steps,
            resume_step=resume_step,
            enabled=self.is_main,
        )
        return self._tracker

    def close(self) -> None:
        if self._tracker is not None:
            rest()  # it may take its time, which is no hang
            self._tracker.close()

    def stop_requested(self) -> bool:
        """Whether any rank was signalled or asked by file to stop. Collective: every rank must call it at the same step."""
        asked = self._signalled or (self.is_main and (self.dir / STOP_FILE).exists())
        if self.world_size == 1:
            return asked
        progress()
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return asked
        flag = torch.tensor([float(asked)], device=_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item() > 0)

    def note(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True

    def publish(
        self,
        write: Callable[[Path], None],
        *,
        base: dict[str, Any] | None,
        method: str,
        metrics: dict[str, float],
        counts: Counts,
        zero_stage: int,
        others: dict[str, Counts] | None = None,
    ) -> None:
        """Publish on rank 0 what `write` puts into a folder, with the manifest of section 4 of the design.

        `counts` say where each row of the stage's data went; `others` of what it reads beside that, by the key that lists
        it. `base` is None for a stage without a model.
        """
        if not self.is_main:
            return
        rest()
        read = {"": counts, **(others or {})}
        facts = {
            "stage": self.stage,
            "kind": self.block.kind,
            "recipe": self.recipe.name,
            "inputs": self.inputs,
            "inputs_hash": chain.key(self.inputs),
            "base": base,
            "adapter": method,
            "parents": self.inputs["parents"],
            "data": [{**source, **read[source.get("for", "")][source["path"]]} for source in self.inputs["data"]],
            "seed": self.block.seed,
            "world_size": self.world_size,
            "zero_stage": zero_stage,
            "versions": {name: version(name) for name in LIBRARIES},
            "metrics": {name: float(value) for name, value in sorted(metrics.items())},
            **({"sizes": self.sizes} if len(self.sizes) > 1 else {}),
        }
        baton = handoff.publish(self.dir, write, facts)
        if self._tracker is not None:
            parents = [(parent.path, parent.manifest) for parent in self.batons.values()]
            tables = tested(baton.manifest["metrics"], baton.path)
            self._tracker.published(Published(baton.path, baton.manifest, parents, tables))
        handoff.write_json(
            self.dir / "session.json",
            {
                "host": socket.gethostname(),
                "python": platform.python_version(),
                "finished": round(time.time(), 3),
                "seconds": round(time.time() - self.began, 1),
                "content_hash": baton.content_hash,
            },
        )


def _device() -> str:
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def main(program: Callable[[Context], None]) -> None:
    """Entry of every stage module: parse the arguments, hold the lock, open the inputs, run, exit with the right code."""
    parser = argparse.ArgumentParser(description=(program.__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", required=True, help="recipe file or the name of a shipped recipe")
    parser.add_argument("--stage", required=True, help="the stage's name in the recipe")
    parser.add_argument("--run-dir", required=True, type=Path, help="folder of the whole run, such as runs/hh")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--lock-held", action="store_true", help=argparse.SUPPRESS)  # `relay run` above holds it
    parser.add_argument(
        "--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    die_with_parents()
    modules.add_working_directory()
    faulthandler.enable()
    code = 0
    try:
        overrides = [*arguments.set, *_launched_size(arguments, world_size)]
        try:
            execute(
                program,
                arguments.recipe,
                arguments.stage,
                arguments.run_dir,
                overrides,
                rank,
                world_size,
                locked=arguments.lock_held,
            )
        except Stopped:
            code = EXIT_STOPPED
        _leave()
    except Exception as error:
        code = faults.tell(error, arguments.run_dir, rank, world_size)
        sys.stdout.flush()
        os._exit(code)  # without the others, who may be gone
    sys.exit(code)


def _leave() -> None:
    """Leave the process group in order, so that no rank sees a peer vanish."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _launched_size(arguments: argparse.Namespace, world_size: int) -> list[str]:
    """By hand, the launcher's `--num_gpus` decides the number of ranks; the recipe's block must agree with it."""
    block = load(arguments.recipe, arguments.set).stages.get(arguments.stage)
    if block is None or block.deepspeed.ranks == world_size:
        return []
    return [
        f"stages.{arguments.stage}.deepspeed.num_gpus={world_size}",
        f"stages.{arguments.stage}.deepspeed.num_nodes=1",
    ]


def execute(
    program: Callable[[Context], None],
    name: str,
    stage: str,
    run_dir: Path,
    overrides: list[str],
    rank: int,
    world_size: int,
    *,
    locked: bool = False,
) -> None:
    """Run a stage program on this rank; rank 0 locks the run directory unless its parent process has (`locked`)."""
    recipe = load(name, overrides)
    if stage not in recipe.stages:
        raise UserError(f"--stage {stage}", "no such stage", expected="one of: " + ", ".join(recipe.stages))
    with run_lock(run_dir) if rank == 0 and not locked else nullcontext(), of_a_rank(run_dir):
        if rank == 0:
            for name in recipe.stages:
                handoff.recover(run_dir / name)
            for model in trusted(recipe.stages[stage]):
                print(f"{stage}: Python code that comes with {model} is run (trust_remote_code)", flush=True)
        record = json.loads(json.dumps(chain.inputs(recipe, stage, run_dir)))
        batons = {parent: handoff.open_baton(run_dir / parent) for parent in recipe.parents(stage)}
        for part in elsewhere(recipe.stages[stage]):
            batons[part.name] = handoff.open_baton(Path(recipe.local(str(part.run))) / part.stage)
        speaking = [batons[name] for name in batons if batons[name].manifest["kind"] not in DATA]
        for other in speaking[1:]:
            handoff.check_same_tokenizer(speaking[0], other)
        context = Context(recipe, stage, run_dir, rank, world_size, record, batons)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, context.note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # held back until here where an agent started it
        if rank == 0:
            _claim_checkpoints(context.dir, chain.key(record), chain.work(record))
        noted = records.launch(context.dir, world_size) if rank == 0 else nullcontext()
        with watchdog(context.block.deepspeed.timeout, rank, world_size), noted, closing(context):
            program(context)


def _claim_checkpoints(stage_dir: Path, key: str, work: str) -> None:
    """Keep only checkpoints of the same work in `checkpoints`; those of other work are set aside under their own key.

    An interrupted training of the same work under another size is gone on with; one that was published is not.
    """
    current = stage_dir / "checkpoints"
    owner = current / "inputs_hash"
    found, *theirs = owner.read_text(encoding="utf-8").split() if owner.exists() else [None]

    def finished() -> bool:
        if (stage_dir / chain.REDO).exists():  # what is published may be damaged
            return False
        return found == (handoff.read_manifest(stage_dir) or {}).get("inputs_hash")

    if found != key and (theirs != [work] or finished()):
        if current.exists():
            for record in RECORDS:
                if (stage_dir / record).exists():
                    os.rename(stage_dir / record, current / record)
            os.rename(current, stage_dir / f"checkpoints.{found or 'unknown'}-{time.time_ns()}")
        aside = sorted(stage_dir.glob(f"checkpoints.{key}-*"))
        if aside:
            os.rename(aside[-1], current)
            for record in RECORDS:
                if (current / record).exists():
                    os.rename(current / record, stage_dir / record)
    current.mkdir(parents=True, exist_ok=True)
    handoff.replace(owner, f"{key} {work}".encode())
