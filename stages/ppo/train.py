"""The PPO loop: sample, judge, update, watch, log, save."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import checkpoint, engine
from pipeline.config.schema import Ppo, Sampling
from pipeline.data.encode import Encoder, Prompt
from pipeline.errors import Trouble
from pipeline.generation.rollout import Rollout, keys
from pipeline.stage import Context, Stopped
from pipeline.tracking import Tracker
from stages.ppo.advantage import ESTIMATORS
from stages.ppo.canary import canary
from stages.ppo.ema import Ema
from stages.ppo.experience import Experience, Judged, experience, kl_estimator, read
from stages.ppo.kl import Controller, estimate
from stages.ppo.metrics import describe, table
from stages.ppo.rewards import Rewards, Skipped
from stages.ppo.scores import RunningScores
from stages.ppo.signals import Raised, Watch
from stages.ppo.stream import Stream
from stages.ppo.update import Updater


@dataclass
class Clock:
    """Seconds spent in each phase of a step, for `time/…`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


@dataclass
class Loop:
    """Everything a PPO run holds: what it works with, then what a checkpoint keeps beside the engine (`state`)."""

    context: Context
    block: Ppo
    engine: Any
    update: Updater
    rewards: Rewards
    gold: Rewards | None
    encoder: Encoder
    prompts: Stream[Prompt]
    held_out: Sequence[Prompt]
    eos: list[int]
    synced: bool
    ema: Ema | None
    step: int = 0
    skipped: int = 0
    checked: bool = False
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    tracker: Tracker | None = None

    def __post_init__(self) -> None:
        self.kl = Controller.from_block(self.block.kl)
        self.running = RunningScores() if self.block.normalize_scores else None
        self.watch = Watch(self.block.signals)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.budget = self.update.budget
        # In float32 the log-probabilities of the rollout are the training forward's but for the last bits: no pass for them.
        self.exact = self.block.base.dtype == "fp32"

    def run(self, tracker: Tracker) -> None:
        """Steps from where the loop stands to the end. Raises Stopped after saving when asked to stop, and Trouble when
        training cannot go on."""
        block, self.tracker = self.block, tracker
        if block.early_stopping and self.stale >= block.early_stopping:
            return  # resumed from the checkpoint at which training ended early
        for step in range(self.step, block.steps):
            clock = Clock()
            try:
                batch = self.collect(step, clock)
                with clock.phase("train"):
                    metrics = self.learn(batch, step)
            except Skipped as reason:
                metrics = self.skip(reason)
            self.step = step + 1
            spent = sum(clock.seconds.values())
            metrics |= {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
            raised: list[Raised] = []
            if "objective/kl" in metrics:
                if step >= block.freezing_actor_steps:  # until then there is no KL to steer by
                    self.kl.update(metrics["objective/kl"], block.rollout_batch)
                metrics["tokens_per_second"] = float(batch.mask.sum()) / max(spent, 1e-9)
                raised = self.watch.step(metrics)
                if step % block.sample_every == 0:
                    tracker.samples(self.step, table(batch, self.encoder))
            tracker.log(self.step, metrics | self.watch.metrics())
            self.heed(raised)
            if self.boundary(tracker):
                break

    def collect(self, step: int, clock: Clock) -> Experience:
        """The rollout of `step`, judged: what the update learns from; the first of a process after the canary. Collective."""
        block, prompts = self.block, self.asked(step)
        rows = [prompt.row for prompt in self.share(prompts, block.samples_per_prompt)]
        with clock.phase("rollout"):
            rollout = self.sample(prompts, step, block.samples_per_prompt)
            greedy = None
            if ESTIMATORS[block.advantage_estimator].greedy:
                greedy = self.sample(prompts, step, block.samples_per_prompt, greedy=True)
        with clock.phase("score"):
            baseline = None
            said = self.read(rollout, *self.judges, *([] if self.exact else ["policy"]))
            try:
                scores, parts = self.rewards(said, rollout, rows)
                if greedy is not None:
                    least = self.rewards(self.read(greedy, *self.rewards.models), greedy, rows)[0]
                    baseline = (least, greedy.lengths, greedy.ended)
            except Trouble as trouble:
                self.fail({n: engine.gather_rows(t) for n, t in vars(rollout).items()}, step, str(trouble))
            kept = rollout.logprobs if self.exact else said["policy"]
            values = said.get("critic", torch.zeros_like(kept))
            judged = Judged(rollout, kept, said["reference"], values, scores, parts, baseline)
            batch = experience(judged, block, self.kl.coef, self.running)
            if bad := batch.not_finite():
                self.fail(batch.tensors(), step, f"{bad[0]} of response {bad[1]} are not finite")
            if not self.checked:
                # In a pass of its own: what the others say must not depend on whether the process is new.
                logprobs = said["policy"] if "policy" in said else self.read(rollout, "policy")["policy"]
                if dead := canary(self, prompts, rollout, logprobs):
                    self.fail(batch.tensors(), step, f"canary: {dead}")
                self.checked = True
        return batch

    @property
    def judges(self) -> list[str]:
        """The roles that read every rollout."""
        critic = ["critic"] if self.update.critic else []
        return ["reference", *critic, *self.rewards.models]

    def read(self, rollout: Rollout, *roles: str) -> dict[str, Tensor]:
        return read(self.engine, rollout, list(roles), self.block.sampling.temperature, self.budget)

    def learn(self, batch: Experience, step: int) -> dict[str, float]:
        """Update the policy (and critic, and average) from a batch; the step's metrics."""
        coef = self.kl.coef
        try:
            stats = self.update(batch, step, coef)
        except Trouble as trouble:
            self.fail(batch.tensors(), step, str(trouble))
        if self.ema is not None and step >= self.block.freezing_actor_steps:
            self.ema.update()
        origins = [prompt.source for prompt in self.asked(step) for _ in range(self.block.samples_per_prompt)]
        return {**describe(batch, coef, critic=self.update.critic, origins=origins), **stats}

    def asked(self, step: int) -> list[Prompt]:
        """The prompts of a step, of all ranks."""
        count = self.block.rollout_batch // self.block.samples_per_prompt
        return self.prompts.take(step * count, count)

    def share(self, prompts: list[Prompt], samples: int) -> list[Prompt]:
        """The prompt of each of this rank's responses, when every prompt has `samples` of them."""
        share = len(prompts) * samples // self.world
        return [prompts[row // samples] for row in range(self.rank * share, (self.rank + 1) * share)]

    def sample(
        self,
        prompts: list[Prompt],
        step: int,
        samples: int = 1,
        *,
        greedy: bool = False,
        seed_offset: int = 0,
        sampling: Sampling | None = None,
    ) -> Rollout:
        """This rank's part of `samples` responses to each of `prompts` (in all a multiple of the ranks), by the policy as
        it is. Responses to one prompt are next to each other."""
        mine, block = self.share(prompts, samples), self.block
        rows = torch.arange(self.rank * len(mine), (self.rank + 1) * len(mine))
        numbers = rows // samples + step * len(prompts)
        noise = keys(block.seed + seed_offset, step, numbers, rows % samples).to(self.engine.device)
        roles = self.engine.module
        # Past the engine where a copy is sampled from: ZeRO-3's hooks would fetch for modules that are not called.
        call = roles.forward if roles.samples_whole("policy") else self.engine
        with roles.evaluating():
            rollout: Rollout = call(
                "rollout",
                "policy",
                [prompt.ids for prompt in mine],
                None if greedy else noise,
                sampling or block.sampling,
                pad=self.encoder.tokenizer.pad_token_id,
                eos=self.eos,
                synced=self.synced,
            )
        return rollout

    def evaluate(self) -> dict[str, float]:
        """Mean score (and gold score), KL and length on held-out prompts, sampled with the same noise every time; nothing
        when a source that may be skipped cannot be reached."""
        count = min(len(self.held_out), self.block.eval_rows)
        padded = [self.held_out[i % count] for i in range(-(-count // self.world) * self.world)]
        rows = [prompt.row for prompt in self.share(padded, 1)]
        rollout = self.sample(padded, 0, seed_offset=1)
        watched = [*self.rewards.models, *(self.gold.models if self.gold is not None else [])]
        said = self.read(rollout, "reference", *dict.fromkeys(watched), *([] if self.exact else ["policy"]))
        try:
            scores, _ = self.rewards(said, rollout, rows)
        except Skipped as reason:
            self._tell(f"an evaluation is left out: {reason}")
            return {}
        except Trouble as trouble:
            self.fail({n: engine.gather_rows(t) for n, t in vars(rollout).items()}, self.step - 1, str(trouble))
        gold = None
        try:
            gold = self.gold(said, rollout, rows)[0] if self.gold is not None else None
        except (Skipped, Trouble) as reason:  # it is watched, not trained on: training goes on without it
            self._tell(f"the gold score is left out: {reason}")
        logprobs = rollout.logprobs if self.exact else said["policy"]
        kl = (estimate(logprobs, said["reference"], kl_estimator(self.block)) * rollout.mask).sum(1)
        scores, kl, lengths = (engine.gather_rows(column)[:count] for column in (scores, kl, rollout.lengths))
        found = {
            "eval/score": float(scores.mean()),
            "eval/kl": float(kl.mean()),
            "eval/length": float(lengths.float().mean()),
        }
        if gold is not None:
            gold = engine.gather_rows(gold)[:count]
            found |= {"eval/gold": float(gold.mean()), "eval/gold_std": float(gold.std(unbiased=False))}
        return found

    def boundary(self, tracker: Tracker) -> bool:
        """What happens between steps: evaluation, best-so-far, saving, stop requests. True when training ends early."""
        block, last = self.block, self.step == self.block.steps
        improved = False
        if block.eval_every and self.held_out and (self.step % block.eval_every == 0 or last):
            metrics = self.evaluate()
            if metrics:
                self.heed(self.watch.evaluation(metrics))
                tracker.log(self.step, metrics)
            improved = bool(metrics) and (self.best is None or metrics["eval/score"] > self.best)
            if improved:
                self.best, self.best_step, self.stale = metrics["eval/score"], self.step, 0
            elif metrics:
                self.stale += 1
        stopping = self.context.stop_requested()
        early = bool(block.early_stopping and self.stale >= block.early_stopping)
        every = block.save_every or max(1, block.steps // 5)
        if self.step % every == 0 or last or stopping or early or (improved and block.publish == "best"):
            self.save()
        if stopping and not last:
            raise Stopped
        return early

    def heed(self, raised: list[Raised]) -> None:
        """Warn of signals; raise Trouble for one that the recipe stops on."""
        for signal in raised:
            self._tell(f"warning: {signal.message}")
            if signal.name in self.block.signals.stop_on:
                since = self.watch.suspect_since()
                if self.context.is_main and since is not None:
                    checkpoint.set_aside(self.context.checkpoints, since)
                dist.barrier()
                self.fail(None, self.step - 1, f"{signal.message} (the recipe stops on {signal.name})")

    def skip(self, reason: Skipped) -> dict[str, float]:
        """Count a batch that a reward source could not score, and leave it out."""
        self.skipped += 1
        self._tell(f"a batch is left out: {reason}")
        return {"skipped_batches": float(self.skipped)}

    def _tell(self, message: str) -> None:
        if self.context.is_main:
            print(f"{self.context.stage}  step {self.step}  {message}", file=sys.stderr, flush=True)
            if self.tracker is not None:
                self.tracker.warn(self.step, message)

    def fail(self, batch: dict[str, Tensor] | None, step: int, reason: str) -> NoReturn:
        """Save the batch, by field, for inspection and raise Trouble. Every rank calls it with the same reason."""
        lines = [f"stage {self.context.stage}, step {step + 1}: {reason}"]
        if batch is not None:
            file = self.context.dir / "trouble" / f"step-{step + 1}.pt"
            lines.append(f"  the batch is saved for inspection: {file}")
            if self.context.is_main:
                file.parent.mkdir(exist_ok=True)
                torch.save({name: value.cpu() for name, value in batch.items()}, file)
            dist.barrier()  # no rank ends the job before the file is whole
        lines.append(
            "  the last good checkpoint is kept; the same command goes on from it once the cause is gone (another recipe or "
            "reward function is other work and starts anew)"
        )
        raise Trouble("\n".join(lines))

    def save(self) -> None:
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "kl_coef": self.kl.coef,
            "best": self.best,
            "best_step": self.best_step,
            "stale": self.stale,
            "copies": self.engine.module.samples_whole("policy"),
            "running_scores": self.running.state() if self.running else None,
            "signals": self.watch.state(),
        }
        engine.save(self.engine, self.context.checkpoints, self.step, state, self.context.sizes, self._write)
        if self.context.is_main:
            kept = [self.best_step] if self.block.publish == "best" else []
            if (since := self.watch.suspect_since()) is not None:
                kept += [n for n in checkpoint.steps(self.context.checkpoints) if n < since][-1:]
            folders = [self.context.checkpoints / f"step-{number}" for number in kept]
            checkpoint.rotate(self.context.checkpoints, self.block.keep_checkpoints, *folders)
        dist.barrier()

    def _write(self, folder: Path) -> None:
        """What a checkpoint holds beside the engine and its state: files of rank 0."""
        for part in self._parts():
            part.save(folder)

    def _parts(self) -> list[Any]:
        return [*self.update.allocations.values(), *([self.ema] if self.ema else [])]

    def resume(self, folder: Path) -> None:
        state = engine.resume(self.engine, folder, self.context.size, self.block.seed)
        self.step, self.skipped, self.kl.coef = state["step"], state["skipped"], state["kl_coef"]
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
        self.running = RunningScores(**state["running_scores"]) if state["running_scores"] else None
        self.watch.load(state["signals"])
        for part in self._parts():
            part.load(folder)
