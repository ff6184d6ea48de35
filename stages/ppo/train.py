"""The PPO loop: sample, judge, update, log, save; and the prompts it goes through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import checkpoint, engine
from pipeline.config.recipe import split as split_batch
from pipeline.config.schema import Ppo
from pipeline.data.encode import Encoder
from pipeline.generation.rollout import Rollout, join, keys
from pipeline.stage import Context, Stopped
from pipeline.tracking import Tracker
from stages.ppo.experience import Experience, experience, judge
from stages.ppo.kl import Controller
from stages.ppo.loss import policy_loss, value_loss

CANARY_TOLERANCE = {"fp32": 1e-3, "bf16": 0.08, "fp16": 0.02}
"""Largest mean difference, in nats per token, between rollout and training log-probabilities; a wrong position or mask
gives tenths of a nat or more."""


@dataclass
class Prompts:
    """An endless stream of prompts: every pass over them in a new order, which depends on the seed and the pass alone."""

    ids: list[list[int]]
    seed: int
    _order: tuple[int, list[int]] = (-1, [])

    def at(self, number: int) -> list[int]:
        """The prompt at place `number` of the stream."""
        turn, place = divmod(number, len(self.ids))
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed((self.seed << 20) + turn)
            self._order = (turn, torch.randperm(len(self.ids), generator=generator).tolist())
        return self.ids[self._order[1][place]]

    def take(self, first: int, count: int) -> list[list[int]]:
        return [self.at(first + i) for i in range(count)]


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
    """Everything a PPO run holds. `state` is what a checkpoint keeps beside the engine: step, KL coefficient, best."""

    context: Context
    block: Ppo
    engine: Any
    clipping: engine.RoleClipping
    encoder: Encoder
    prompts: Prompts
    held_out: list[list[int]]
    eos: list[int]
    synced: bool
    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0

    def __post_init__(self) -> None:
        self.kl = Controller.from_block(self.block.kl)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.micro, _ = split_batch(
            "ppo", self.block.rollout_batch // self.block.minibatches, self.world, self.block.micro_batch
        )

    def run(self, tracker: Tracker) -> None:
        """Steps from where the loop stands to the end. Raises Stopped after saving when asked to stop."""
        block, first = self.block, self.step
        if block.early_stopping and self.stale >= block.early_stopping:
            return  # resumed from the checkpoint at which training ended early
        for step in range(first, block.steps):
            clock = Clock()
            with clock.phase("rollout"):
                rollout = self.sample(self.prompts.take(step * block.rollout_batch, block.rollout_batch), step)
            with clock.phase("score"):
                judged = judge(self.engine, rollout, block.sampling.temperature, self.micro)
                if step == first:
                    self.canary(rollout, judged.logprobs)
                batch = experience(judged, block, self.kl.coef)
            with clock.phase("train"):
                stats = self.update(batch, step)
            self.step = step + 1
            metrics = {**describe(batch, self.kl.coef), **stats}
            self.kl.update(metrics["objective/kl"], block.rollout_batch)
            spent = sum(clock.seconds.values())
            metrics |= {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
            metrics["tokens_per_second"] = float(batch.mask.sum()) / max(spent, 1e-9)
            tracker.log(self.step, metrics)
            if step % block.sample_every == 0:
                tracker.samples(self.step, self.table(batch))
            if self.boundary(tracker):
                break

    def sample(self, prompts: list[list[int]], step: int, *, seed_offset: int = 0) -> Rollout:
        """This rank's part of a rollout of `prompts` (a multiple of the ranks), by the policy as it is."""
        share = len(prompts) // self.world
        first = self.rank * share
        numbers = torch.arange(first, first + share) + step * self.block.rollout_batch
        noise = keys(self.block.seed + seed_offset, step, numbers, torch.zeros_like(numbers)).to(self.engine.device)
        pad, mine, size = self.encoder.tokenizer.pad_token_id, prompts[first : first + share], self.block.sampling.batch
        with self.engine.module.evaluating():
            parts = [
                self.engine(
                    "rollout",
                    "policy",
                    mine[start : start + size],
                    noise[start : start + size],
                    self.block.sampling,
                    pad=pad,
                    eos=self.eos,
                    synced=self.synced,
                )
                for start in range(0, share, size)
            ]
        return join(parts, pad)

    def update(self, batch: Experience, step: int) -> dict[str, float]:
        """PPO epochs over minibatches of the rollout; the optimizer steps once per minibatch.

        The loss of a minibatch is the masked token mean over all ranks: each micro-batch adds its sum x ranks / tokens, and
        DeepSpeed averages gradients over ranks. Which rows form a minibatch does not depend on the number of ranks.
        """
        block, sums = self.block, torch.zeros(8, dtype=torch.float64)
        self.engine.module.train()
        size = block.rollout_batch // block.minibatches
        for epoch in range(block.epochs):
            generator = torch.Generator().manual_seed(((block.seed << 20) + step) * 1000 + epoch)
            order = torch.randperm(block.rollout_batch, generator=generator)
            for number in range(block.minibatches):
                self._set_learning_rates((step * block.epochs + epoch) * block.minibatches + number)
                chosen = order[number * size : (number + 1) * size]
                tokens = float(batch.mask[chosen.to(batch.mask.device)].sum())
                mine = chosen[self.rank * size // self.world : (self.rank + 1) * size // self.world]
                for start in range(0, len(mine), self.micro):
                    rows = batch.rows(mine[start : start + self.micro].to(batch.mask.device))
                    loss, parts = self.losses(rows)
                    self.engine.backward(loss * self.world / tokens, scale_wrt_gas=False)
                    self.engine.step()
                    sums += parts
        return self._stats(sums)

    def losses(self, rows: Experience) -> tuple[Tensor, Tensor]:
        """(policy loss + value loss summed over tokens, eight sums for the metrics)."""
        width = rows.mask.shape[1]
        logprobs, entropy = self.engine(
            "log_probs", "policy", rows.tokens, rows.prompt_lengths, width, self.block.sampling.temperature
        )
        values = self.engine("values", "critic", rows.tokens, rows.prompt_lengths, width)
        policy, policy_clipped = policy_loss(logprobs, rows.logprobs, rows.advantages, self.block.clip)
        value, value_clipped = value_loss(values, rows.values, rows.returns, self.block.value_clip)
        total = (policy * rows.mask).sum() + (value * rows.mask).sum()
        with torch.no_grad():
            change = (logprobs - rows.logprobs) * rows.mask
            columns = [policy, value, policy_clipped, value_clipped, change.exp(), 0.5 * change.pow(2), entropy]
            sums = [(c.detach() * rows.mask).sum() for c in columns] + [rows.mask.sum()]
        return total, torch.stack(sums).double().cpu()

    def _stats(self, sums: Tensor) -> dict[str, float]:
        shared = sums.to(self.engine.device, torch.float32)
        dist.all_reduce(shared)
        policy, value, clipped, value_clipped, ratio, approxkl, entropy = (shared[:7] / shared[7]).tolist()
        rates = {f"lr/{g['name']}": float(g["lr"]) for g in self.engine.optimizer.param_groups}
        return {
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/clipfrac_avg": clipped,
            "val/clipfrac_avg": value_clipped,
            "val/ratio": ratio,
            "policy/approxkl_avg": approxkl,
            "policy/entropy_avg": entropy,
            **rates,
            **{f"grad_norm/{name}": norm for name, norm in self.clipping.norms.items()},
        }

    def _set_learning_rates(self, update: int) -> None:
        block = self.block
        total = block.steps * block.epochs * block.minibatches
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * engine.learning_rate_factor(block, update, total)

    def evaluate(self) -> dict[str, float]:
        """Mean score, KL and length on held-out prompts, sampled with the same noise every time."""
        count = min(len(self.held_out), self.block.eval_rows)
        padded = [self.held_out[i % count] for i in range(-(-count // self.world) * self.world)]
        rollout = self.sample(padded, 0, seed_offset=1)
        batch = experience(judge(self.engine, rollout, self.block.sampling.temperature, self.micro), self.block, 0.0)
        sequence_kl = (batch.kl * batch.mask).sum(1)[:count]
        return {
            "eval/score": float(batch.scores[:count].mean()),
            "eval/kl": float(sequence_kl.mean()),
            "eval/length": float(batch.lengths[:count].float().mean()),
        }

    def boundary(self, tracker: Tracker) -> bool:
        """What happens between steps: evaluation, best-so-far, saving, stop requests. True when training ends early."""
        block, last = self.block, self.step == self.block.steps
        improved = False
        if block.eval_every and self.held_out and (self.step % block.eval_every == 0 or last):
            metrics = self.evaluate()
            tracker.log(self.step, metrics)
            improved = self.best is None or metrics["eval/score"] > self.best
            if improved:
                self.best, self.best_step, self.stale = metrics["eval/score"], self.step, 0
            else:
                self.stale += 1
        stopping = self.context.stop_requested()
        early = bool(block.early_stopping and self.stale >= block.early_stopping)
        every = block.save_every or max(1, block.steps // 5)
        if self.step % every == 0 or last or stopping or early or (improved and block.publish == "best"):
            self.save()
        if stopping and not last:
            raise Stopped
        return early

    def save(self) -> None:
        state = {
            "step": self.step,
            "kl_coef": self.kl.coef,
            "best": self.best,
            "best_step": self.best_step,
            "stale": self.stale,
        }
        engine.save(self.engine, self.context.checkpoints, self.step, state)
        if self.context.is_main:
            best = self.context.checkpoints / f"step-{self.best_step}" if self.block.publish == "best" else None
            checkpoint.rotate(self.context.checkpoints, self.block.keep_checkpoints, best)
        dist.barrier()

    def resume(self, folder: Path) -> None:
        state = engine.resume(self.engine, folder)
        self.step, self.kl.coef = state["step"], state["kl_coef"]
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]

    def canary(self, rollout: Rollout, logprobs: Tensor) -> None:
        """Stop a run that does not see its own policy: rollout and training must agree on the log-probabilities of the
        sampled tokens, and a trained adapter must make a difference."""
        difference = ((rollout.logprobs - logprobs).abs().sum() / rollout.mask.sum()).reshape(1)
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        limit = CANARY_TOLERANCE[self.block.base.dtype]
        if not float(difference) <= limit:
            raise RuntimeError(
                f"canary: rollout and training log-probabilities differ by {float(difference):.4f} nats per "
                f"token, more than {limit} allows in {self.block.base.dtype}; the rollout engine and the "
                "training forward do not see the same positions, mask or adapter"
            )
        if "base" in self.engine.module.roles:
            width = rollout.logprobs.shape[1]
            with self.engine.module.evaluating():
                bare, _ = self.engine(
                    "log_probs",
                    "base",
                    rollout.tokens[: self.micro],
                    rollout.prompt_lengths[: self.micro],
                    width,
                    self.block.sampling.temperature,
                )
            if torch.equal(bare * rollout.mask[: self.micro], logprobs[: self.micro]):
                raise RuntimeError("canary: the policy's trained adapter changes nothing; it is not the active one")

    def table(self, batch: Experience, rows: int = 4) -> list[dict[str, Any]]:
        """Prompt, reply, score and KL of the first rows."""
        table = []
        for row in range(min(rows, len(batch.scores))):
            start, end = int(batch.prompt_lengths[row]), int(batch.prompt_lengths[row] + batch.lengths[row])
            table.append(
                {
                    "prompt": self.encoder.text(batch.tokens[row, :start].tolist()),
                    "reply": self.encoder.text(batch.tokens[row, start:end].tolist()),
                    "score": float(batch.scores[row]),
                    "kl": float(batch.kl[row].sum()),
                }
            )
        return table


def describe(batch: Experience, coef: float) -> dict[str, float]:
    """Means over the rollout's sequences, under the names TRL's dashboards know."""
    kl = (batch.kl * batch.mask).sum(1)
    penalty = -coef * kl
    return {
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": coef,
        "objective/entropy": float(-(batch.logprobs * batch.mask).sum(1).mean()),
        "objective/scores": float(batch.scores.mean()),
        "objective/non_score_reward": float(penalty.mean()),
        "objective/rlhf_reward": float((batch.scores + penalty).mean()),
        "val/num_eos_tokens": float(batch.ended.sum()),
        "objective/length": float(batch.lengths.float().mean()),
        "val/explained_variance": _explained(batch),
    }


def _explained(batch: Experience) -> float:
    """1 - Var(return - value) / Var(return) over response tokens."""
    kept = batch.mask.bool()
    returns, error = batch.returns[kept], (batch.returns - batch.values)[kept]
    spread = float(returns.var(unbiased=False))
    return 1.0 - float(error.var(unbiased=False)) / spread if spread > 0 else 0.0
