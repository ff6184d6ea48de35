"""The one bridge to TRL's trainers: recipe to arguments, callbacks to Relay's metrics, checkpoints and stop requests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
import transformers.trainer
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pipeline import checkpoint, engine, gradients, resize
from pipeline.adapters import lora_plus
from pipeline.adapters.adalora import Allocation
from pipeline.config.recipe import deepspeed_config
from pipeline.config.recipe import split as split_batch
from pipeline.config.schema import Supervised
from pipeline.data.split import Counts
from pipeline.errors import Trouble, UserError
from pipeline.handoff import Baton
from pipeline.model import begin
from pipeline.stage import Context, Stopped
from pipeline.tracking import Tracker
from pipeline.watchdog import progress

HIDDEN = ("runtime", "per_second", "total_flos", "epoch")
"""Parts of the names of numbers that depend on the machine or repeat the step; they are not logged."""


def whole_batches(context: Context, block: Supervised, rows: int, held_out: int) -> tuple[int, int]:
    """(optimizer steps, rows that fill whole batches) of so many `rows`: `steps`, else the batches in `epochs` passes."""
    where = context.recipe.where("stages", context.stage, "batch")
    if rows < block.batch:
        raise UserError(
            where,
            f"a batch of {block.batch} with {rows} rows",
            expected="at least one whole batch",
            fix="lower `batch`, or add data",
        )
    context.require_held_out(block.eval_every, held_out)
    kept = rows // block.batch * block.batch
    return block.steps or max(1, math.floor(block.epochs * kept / block.batch)), kept


def arguments(context: Context, block: Supervised, steps: int) -> dict[str, Any]:
    """Keyword arguments that SFTConfig and RewardConfig share."""
    micro, accumulation = split_batch(
        context.recipe.where("stages", context.stage, "batch"), block.batch, context.world_size, block.micro_batch
    )
    config = engine.overlay(
        deepspeed_config(context.recipe, context.stage),
        dtype=block.base.dtype,
        micro_batch=micro,
        accumulation=accumulation,
        max_grad_norm=block.max_grad_norm,
    )
    every = block.save_every or block.eval_every or max(1, steps // 5)
    best = block.publish == "best"
    return {
        "output_dir": str(context.checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "restore_callback_states_from_checkpoint": True,
        "learning_rate": block.lr,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(block.lr_schedule, block.lr_schedule),
        "warmup_steps": engine.warmup_steps(block, steps),
        "weight_decay": block.weight_decay,
        "adam_beta1": block.betas[0],
        "adam_beta2": block.betas[1],
        "optim": "adamw_torch",
        "max_grad_norm": block.max_grad_norm,
        "bf16": block.base.dtype == "bf16",
        "fp16": block.base.dtype == "fp16",
        "gradient_checkpointing": block.gradient_checkpointing,
        # ZeRO-3 gathers an adapter's weights for a recomputation only in the reentrant form.
        "gradient_checkpointing_kwargs": {"use_reentrant": True}
        if engine.zero_stage(config) == 3 and not block.adapter.is_full
        else None,
        "eval_strategy": "steps" if block.eval_every else "no",
        "eval_steps": block.eval_every,
        "save_strategy": "steps",
        "save_steps": block.eval_every if best else every,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if block.eval_every else None,
        "greater_is_better": False,
        "logging_steps": block.log_every,
        "seed": block.seed,
        "data_seed": block.seed,
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": config,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }


@dataclass(frozen=True)
class Ready:
    """What a trainer starts from: the model with what is trained on it, the record of its base, the ZeRO stage, AdaLoRA's
    allocation of ranks, and the checkpoint to resume."""

    model: Any
    base: dict[str, Any]
    zero: int
    allocation: Allocation | None
    resume: Path | None

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.resume) if self.resume else 0


def ready(
    context: Context,
    arguments: TrainingArguments,
    parent: Baton | None,
    tok: Any,
    kind: Literal["causal", "classifier"],
    longest: int,
    labels: Sequence[str] = (),
) -> Ready:
    """The stage's model for a trainer with these `arguments`; `longest` is the tokens of its longest text."""
    zero, steps = engine.zero_stage(arguments.deepspeed), arguments.max_steps
    model, base = begin.model(
        context, parent, tok, kind, sharded=zero == 3, steps=steps, longest=longest, labels=labels
    )
    allocation = Allocation(model) if context.block.adapter.method == "adalora" else None
    engine.fit_buckets(arguments.hf_deepspeed_config.config, model)
    resume = engine.agreed(checkpoint.newest(context.checkpoints) if context.is_main else None)
    if resume:
        context.resumes(resume)
    return Ready(model, base, zero, allocation, resume)


def hooks(context: Context, block: Supervised, start: Ready, tracker: Tracker) -> dict[str, Any]:
    """Keyword arguments of a trainer: Relay's callbacks, and LoRA+'s optimizer where the recipe asks for one."""
    early = [EarlyStoppingCallback(block.early_stopping)] if block.early_stopping else []
    bridge = Bridge(context, block.keep_checkpoints, tracker, start.allocation)
    return {"callbacks": [bridge, *early], **lora_plus.for_trainer(start.model, block.adapter, block)}


def train(context: Context, trainer: Any, start: Ready) -> None:
    """Train to the end, from a checkpoint if there is one. Raises Stopped when asked to stop."""
    resume = start.resume
    trainer.remove_callback(PrinterCallback)
    bridge = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Bridge))
    bridge.engine = lambda: trainer.model_wrapped
    bridge.seen = lambda: getattr(trainer, "_total_train_tokens", 0)
    if resume:  # TRL counts from nothing again
        trainer._total_train_tokens = checkpoint.facts(resume).get("tokens", 0)
    if bridge.allocation is not None and resume:
        bridge.allocation.load(resume)
    load_best = trainer._load_best_model

    def load_undamaged() -> None:
        best = Path(trainer.state.best_model_checkpoint)
        if problem := engine.on_main(lambda: checkpoint.damage(best)):
            raise UserError(
                str(best), f"the best checkpoint is damaged: {problem}", fix="run the stage again with --from"
            )
        load_best()

    trainer._load_best_model = load_undamaged
    with loading_any_size(context):
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except Finished:
            if trainer.args.load_best_model_at_end:
                trainer._load_best_model()
    if bridge.stopped:
        raise Stopped
    if bridge.allocation is not None:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            bridge.allocation.load(Path(trainer.state.best_model_checkpoint))
        bridge.allocation.publish()


@contextmanager
def loading_any_size(context: Context) -> Iterator[None]:
    """Meanwhile transformers loads checkpoints, the newest and the best one, whichever size saved them."""
    usual = transformers.trainer.deepspeed_load_checkpoint

    def load(started: Any, path: str, **options: Any) -> None:
        folder = Path(path)
        if not checkpoint.resized(folder, context.size):
            usual(started, path, **options)
            return
        resize.load(started, folder / (folder / "latest").read_text(encoding="utf-8").strip())
        # Ranks that saved a generator's state load it later.
        engine.seed_new_rank(context.block.seed, checkpoint.step_of(folder))

    transformers.trainer.deepspeed_load_checkpoint = load
    try:
        yield
    finally:
        transformers.trainer.deepspeed_load_checkpoint = usual


def publish(
    context: Context,
    start: Ready,
    write: Callable[[Path], None],
    metrics: dict[str, float],
    counts: Counts,
    others: dict[str, Counts] | None = None,
) -> None:
    """Hand on what was trained, as `write` puts it into a folder. `others` are counts of data beside the first key's."""
    facts: dict[str, Any] = {"base": start.base, "method": context.block.adapter.method, "zero_stage": start.zero}
    context.publish(write, metrics=metrics, counts=counts, others=others, **facts)


class Finished(Exception):
    """The checkpoint that was resumed is the training's last: nothing is left but to publish."""


class Bridge(TrainerCallback):
    """Logs to the tracker, completes and rotates checkpoints, and turns a stop request into save-and-stop. With an
    `allocation`, that acts at every step and is in every checkpoint."""

    engine: Callable[[], Any]  # the DeepSpeed engine, once there is one
    seen: Callable[[], int]  # tokens since the stage began, in whatever launch

    def __init__(self, context: Context, keep: int, tracker: Tracker, allocation: Allocation | None) -> None:
        self.context, self.keep, self.tracker, self.stopped = context, keep, tracker, False
        self.allocation = allocation
        self.scale: gradients.LossScale | None = None
        self._tokens = (0.0, time.monotonic())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Transformers looks at max_steps only after a step: resumed from its last checkpoint it would take one too many.
        last = self.context.checkpoints / f"checkpoint-{state.global_step}"
        if state.global_step and checkpoint.facts(last).get("finished"):
            raise Finished
        self._tokens = (self.seen(), time.monotonic())
        if self.allocation is not None:
            self.allocation.follow(self.engine(), lambda: state.global_step)
        gradients.stop_on_not_finite(self.engine(), lambda reason: self.fail(state.global_step + 1, reason))
        if args.fp16:
            self.scale = gradients.LossScale(self.engine())

    def fail(self, step: int, reason: str) -> NoReturn:
        """Raise Trouble. Every rank calls it with the same reason."""
        raise Trouble(
            f"stage {self.context.stage}, step {step}: {reason}\n"
            "  nothing is saved of it: the last good checkpoint is kept, and the same command goes on from it; to change what "
            "led here (data, a smaller `lr`, `max_grad_norm`, `dtype`) is other work and starts anew"
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.scale is not None:
            self.scale.before_step()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        progress()

    on_prediction_step = on_substep_end

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.scale is not None:
            try:
                self.scale.after_step()
            except Trouble as reason:
                self.fail(state.global_step, str(reason))
        elif not self.engine().was_step_applied():  # left out, as some configurations ask for; it would not mend
            self.fail(state.global_step, "a gradient is not finite")
        if self.context.stop_requested() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        metrics = {
            k: float(v) for k, v in logs.items() if isinstance(v, int | float) and not any(h in k for h in HIDDEN)
        }
        metrics.pop("train_loss", None)
        for name in ("loss", "eval_loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                self.fail(state.global_step, f"the {name} is {metrics[name]:g}")
        if "num_tokens" in metrics and "loss" in metrics:
            seen, now = self._tokens
            if metrics["num_tokens"] > seen:
                metrics["tokens_per_second"] = (metrics["num_tokens"] - seen) / max(time.monotonic() - now, 1e-9)
            self._tokens = (metrics["num_tokens"], time.monotonic())
        if "loss" in metrics and self.allocation is not None:
            metrics |= self.allocation.metrics()
        if "loss" in metrics and self.scale is not None:
            metrics |= self.scale.metrics()
        if metrics:
            self.tracker.log(state.global_step, metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        dist.barrier()

        def complete() -> None:
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            finished = bool(control.should_training_stop and not self.stopped)
            folder = self.context.checkpoints / f"checkpoint-{state.global_step}"
            if self.allocation is not None:
                self.allocation.save(folder)
            facts = {
                "step": state.global_step,
                "finished": finished,
                "sizes": self.context.sizes,
                "tokens": self.seen(),
            }
            checkpoint.complete(folder, facts)
            checkpoint.rotate(self.context.checkpoints, self.keep, best)

        engine.on_main(complete)
