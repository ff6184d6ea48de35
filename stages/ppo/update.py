"""The update: epochs over minibatches of a rollout, clipped losses, one optimizer step per minibatch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import engine, gradients
from pipeline.adapters.adalora import Allocation
from pipeline.config.schema import Ppo, Schedule
from pipeline.errors import Trouble
from pipeline.watchdog import progress
from stages.ppo.advantage import ESTIMATORS
from stages.ppo.batches import dealt, micro_batch
from stages.ppo.experience import Experience, kl_place
from stages.ppo.kl import estimate
from stages.ppo.loss import policy_loss, token_weights, value_loss
from stages.ppo.ptx import Mixture

COLUMNS = ("policy", "value", "clipped", "value_clipped", "ratio", "approxkl", "entropy", "tokens")
OTHERS = ("cells", "filled", "ptx", "ptx_tokens")
"""What an update adds up for its metrics: over response tokens; then cells of its micro-batches and those that hold a token,
and the supervised loss over its target tokens."""


def _sums(rows: Experience, columns: dict[str, Tensor]) -> Tensor:
    """Sums over response tokens, float64, in the order of COLUMNS and OTHERS; 0 for those that are not given."""
    sums = torch.zeros(len(COLUMNS + OTHERS), dtype=torch.float64)
    for name, column in columns.items():
        sums[COLUMNS.index(name)] = float((column.detach() * rows.mask).sum())
    return sums


@dataclass
class Updater:
    """Learns from one rollout batch at a time. `ptx` is the supervised data that is mixed in, or None; `allocations` are those
    of AdaLoRA's ranks, by role."""

    block: Ppo
    engine: Any
    clipping: engine.RoleClipping
    ptx: Mixture | None
    allocations: dict[str, Allocation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        block, estimator = self.block, ESTIMATORS[self.block.advantage_estimator]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.size = block.rollout_batch // block.minibatches
        self.rows, self.budget = micro_batch(block, self.world)
        self.mixed_rows = max(1, self.budget // block.ptx.max_length) if block.ptx else 0
        self.critic = estimator.critic
        self.scale = gradients.LossScale(self.engine) if block.base.dtype == "fp16" else None
        # ZeRO 1 to 3 want every parameter's gradient in a minibatch's first backward pass: later ones add to what lies there.
        apart = self.critic and block.critic.kind != "head" and self.engine.zero_optimization_stage() == 0
        self.turns = 2 if apart else 1
        self.aggregation = block.loss_aggregation or estimator.aggregation
        own = block.critic
        self.schedules = {
            "policy": block,
            "critic": Schedule(
                lr_schedule=own.lr_schedule or block.lr_schedule,
                warmup=block.warmup if own.warmup is None else own.warmup,
            ),
        }

    def __call__(self, batch: Experience, step: int, kl_coef: float) -> dict[str, float]:
        """PPO epochs over minibatches of the rollout of `step`; the metrics.

        The loss of a minibatch is its mean over all ranks: each micro-batch adds its weighted sum x ranks, and DeepSpeed
        averages gradients over ranks. Which rows form a minibatch does not depend on the number of ranks. With `target_kl`
        the minibatch whose mean approximate KL to the rollout's policy exceeds it is the update's last.
        """
        block, sums, updates = self.block, torch.zeros(len(COLUMNS + OTHERS), dtype=torch.float64), 0
        self.engine.module.train()
        for epoch in range(block.epochs):
            generator = torch.Generator().manual_seed(((block.seed << 20) + step) * 1000 + epoch)
            order = torch.randperm(block.rollout_batch, generator=generator)
            for minibatch in range(block.minibatches):
                number = (step * block.epochs + epoch) * block.minibatches + minibatch
                self._set_learning_rates(number)
                chosen = order[minibatch * self.size : (minibatch + 1) * self.size].to(batch.mask.device)
                found = self._minibatch(batch, chosen, step, number, kl_coef)
                sums, updates = sums + found, updates + 1
                if block.target_kl is not None and self._mean_kl(found) > block.target_kl:
                    return self._metrics(sums, updates)
        return self._metrics(sums, updates)

    def _minibatch(self, batch: Experience, chosen: Tensor, step: int, number: int, kl_coef: float) -> Tensor:
        """One optimizer step on the rows `chosen` of all ranks; this rank's sums."""
        sums, before = torch.zeros(len(COLUMNS + OTHERS), dtype=torch.float64), self.clipping.steps
        tokens = float(batch.mask[chosen].sum())
        lengths = (batch.prompt_lengths + batch.lengths)[chosen]
        mixed, targets = self.ptx.parts(number, self.rank, self.world, self.mixed_rows) if self.ptx else ([], 1)
        if self.scale is not None:
            self.scale.before_step()
        parts = dealt(lengths, self.rank, self.world, self.budget)
        for place, index in enumerate(parts, start=1):
            for turn, (loss, found) in enumerate(self.losses(batch.rows(chosen[index]), tokens, kl_coef), start=1):
                self._backward(loss, number, last=place == len(parts) + len(mixed) and turn == self.turns)
                sums += found
        # Backward passes of their own: ZeRO-3 with recomputed activations keeps one gradient of a weight for each.
        for place, rows in enumerate(mixed, start=1):
            assert self.ptx is not None
            supervised = self.ptx.loss(self.engine, rows)
            self._backward(self.ptx.coef(step) * supervised / targets, number, last=place == len(mixed))
            sums[-2] += float(supervised.detach())
        sums[-1] = targets / self.world
        # In fp16 a step that is left out lowers the loss scale; in other dtypes nothing would mend.
        if self.scale is not None:
            self.scale.after_step()
        elif self.clipping.steps == before:
            raise Trouble("a gradient is not finite")
        return sums

    def _backward(self, loss: Tensor, number: int, *, last: bool) -> None:
        """Add the gradients of a micro-batch of minibatch `number`; step the optimizer after its last."""
        progress()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        if last:
            for allocation in self.allocations.values():
                allocation.before_step(self.engine, number)
            self.clipping.measure(self.engine)
        self.engine.step()
        if last:
            for allocation in self.allocations.values():
                allocation.after_step(self.engine, number)

    def losses(self, rows: Experience, tokens: float, kl_coef: float) -> Iterator[tuple[Tensor, Tensor]]:
        """(this micro-batch's share of the minibatch's mean loss, its sums), once, or the policy's and then the critic's; the
        minibatch has `tokens` response tokens."""
        block, width = self.block, rows.mask.shape[1]
        asked = (rows.tokens, rows.prompt_lengths, rows.lengths, width, block.sampling.temperature)
        learn = {"learn_entropy": block.entropy_coef > 0}
        values = None
        if self.critic and block.critic.kind == "head":
            logprobs, entropy, values = self.engine("log_probs_and_values", "policy", "critic", *asked, **learn)
        else:
            logprobs, entropy = self.engine("log_probs", "policy", *asked, **learn)
        weights = token_weights(rows.mask, rows.lengths, self.size, tokens, self.aggregation)
        policy, clipped = policy_loss(logprobs, rows.logprobs, rows.advantages, block.clip, block.dual_clip)
        total = (policy * weights).sum()
        if kl_place(block) == "loss":
            total = total + kl_coef * (estimate(logprobs, rows.reference, "k3") * weights).sum()
        if block.entropy_coef > 0:
            total = total - block.entropy_coef * (entropy * weights).sum()
        change = (logprobs - rows.logprobs).detach() * rows.mask
        columns = {"policy": policy, "clipped": clipped, "ratio": change.exp(), "approxkl": 0.5 * change.pow(2)}
        sums = _sums(rows, columns | {"entropy": entropy, "tokens": torch.ones_like(rows.mask)})
        sums[-len(OTHERS)] = rows.tokens.numel()
        sums[-len(OTHERS) + 1] = float((rows.prompt_lengths + rows.lengths).sum())
        if not self.critic:
            yield total, sums
            return
        if self.turns == 2:
            yield total, sums  # its backward pass frees the policy's activations before there are any of the critic
            total, sums = torch.zeros_like(total), torch.zeros_like(sums)
        if values is None:
            values = self.engine("values", "critic", rows.tokens, rows.prompt_lengths, width)
        value, value_clipped = value_loss(values, rows.values, rows.returns, block.value_clip)
        found = _sums(rows, {"value": value, "value_clipped": value_clipped})
        yield total + (value * rows.mask).sum() / tokens, sums + found

    def _mean_kl(self, sums: Tensor) -> float:
        """Mean over a minibatch's tokens on all ranks of half the squared change of the log-probability."""
        shared = sums[[COLUMNS.index("approxkl"), COLUMNS.index("tokens")]].to(self.engine.device, torch.float32)
        dist.all_reduce(shared)
        return float(shared[0] / shared[1])

    def _metrics(self, sums: Tensor, updates: int) -> dict[str, float]:
        shared = sums.to(self.engine.device, torch.float32)
        dist.all_reduce(shared)
        mean = dict(zip(COLUMNS, (shared / shared[COLUMNS.index("tokens")]).tolist(), strict=False))
        if not math.isfinite(mean["policy"] + mean["value"]):
            raise Trouble("the loss is not finite")
        cells, filled, supervised, targets = shared[-len(OTHERS) :].tolist()
        critic = {"loss/value_avg": mean["value"], "val/clipfrac_avg": mean["value_clipped"]} if self.critic else {}
        ptx = {"loss/ptx_avg": supervised / targets} if self.ptx else {}
        return {
            "loss/policy_avg": mean["policy"],
            **critic,
            **ptx,
            "policy/clipfrac_avg": mean["clipped"],
            "val/ratio": mean["ratio"],
            "policy/approxkl_avg": mean["approxkl"],
            "policy/entropy_avg": mean["entropy"],
            "policy/updates": float(updates),
            "perf/padding_share": 1.0 - filled / cells,
            **{f"lr/{g['name']}": float(g["lr"]) for g in self.engine.optimizer.param_groups},
            **{f"grad_norm/{name}": norm for name, norm in self.clipping.norms.items()},
            **(self.scale.metrics() if self.scale else {}),
            **{f"{k}/{role}": v for role, ranks in self.allocations.items() for k, v in ranks.metrics().items()},
        }

    def _set_learning_rates(self, update: int) -> None:
        """The policy's schedule begins when it is no longer frozen."""
        block = self.block
        per_step = block.epochs * block.minibatches
        for group in self.engine.optimizer.param_groups:
            role = engine.role_of(group)
            waits = block.freezing_actor_steps * per_step if role == "policy" else 0
            schedule, total = self.schedules[role], block.steps * per_step - waits
            factor = engine.learning_rate_factor(schedule, update - waits, total) if update >= waits else 0.0
            group["lr"] = group["peak_lr"] * factor
