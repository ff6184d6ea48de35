"""From a rollout to what the update learns from: log-probabilities, KL, scores, values, advantages, returns."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Ppo
from pipeline.engine import gather_rows as gather
from pipeline.generation.rollout import Rollout
from pipeline.watchdog import progress
from stages.ppo.advantage import ESTIMATORS, Given, token_rewards, whiten
from stages.ppo.batches import by_length, restored
from stages.ppo.kl import estimate
from stages.ppo.scores import RunningScores, shaped


@dataclass(frozen=True)
class Judged:
    """One rank's rollout with what the roles and reward sources say of it. B is this rank's rows.

    logprobs, reference, values           float32 [B, T], 0 past each response; values are 0 without a critic
    scores                                float32 [B], raw: the weighted sum of the reward sources
    parts                                 each source's own scores, float32 [B], by its name
    greedy                                (scores [B], lengths [B], ended [B]) of the prompts' greedy responses, or None
    """

    rollout: Rollout
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    greedy: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Experience:
    """The rollout batch of all ranks, in prompt order, the same on every rank. B is the global batch.

    tokens int64 [B, L]; prompt_lengths, lengths int64 [B]; ended bool [B]; mask, logprobs, reference, values, kl, advantages,
    returns float32 [B, T]; scores float32 [B] as the sources give them, and `parts` of them by source.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    ended: Tensor
    mask: Tensor
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor) -> Experience:
        """Some rows, cut to the longest of them."""
        length = int((self.prompt_lengths[index] + self.lengths[index]).max())
        width = int(self.lengths[index].max())
        cut = {"tokens": length}
        picked: dict[str, Any] = {
            name: value[index, : cut.get(name, width)] if value.dim() == 2 else value[index]
            for name, value in self.tensors().items()
        }
        return Experience(**picked)

    def tensors(self) -> dict[str, Tensor]:
        """All fields but `parts`, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}

    def not_finite(self) -> tuple[str, int] | None:
        """The first of log-probabilities, values and scores that holds NaN or inf, with its first such row."""
        for name in ("logprobs", "reference", "values", "scores", "advantages"):
            value = getattr(self, name)
            bad = ~torch.isfinite(value if value.dim() == 1 else value.sum(1))
            if bad.any():
                return name, int(bad.nonzero()[0])
        return None


def read(engine: Any, rollout: Rollout, roles: list[str], temperature: float, budget: int) -> dict[str, Tensor]:
    """What each role says of the rollout, at most `budget` tokens at a time: log-probabilities of one that speaks and values
    of the critic, float32 [B, T] and 0 past each response; scores of a reward model, float32 [B]."""
    width, pieces = rollout.logprobs.shape[1], []
    index = by_length(rollout.prompt_lengths + rollout.lengths, budget)
    with engine.module.evaluating():
        for rows in index:
            progress()
            pieces.append(engine("read", roles, *rollout.rows(rows), width, temperature))
    said = {role: restored([piece[role] for piece in pieces], index) for role in roles}
    return {role: column * rollout.mask if column.dim() == 2 else column for role, column in said.items()}


def experience(judged: Judged, block: Ppo, coef: float, running: RunningScores | None = None) -> Experience:
    """Gather all ranks' rows and turn them into advantages and returns (section 6 of the design, steps 2 to 4).

    `running`, if given, takes in the batch's scores and normalises them.
    """
    estimator, place = ESTIMATORS[block.advantage_estimator], kl_place(block)
    rollout = judged.rollout
    lengths, ended = gather(rollout.lengths), gather(rollout.ended)
    logprobs, reference, values = gather(judged.logprobs), gather(judged.reference), gather(judged.values)
    scores = gather(judged.scores)
    if running is not None:
        running.add(scores)
    mask = (torch.arange(logprobs.shape[1], device=lengths.device) < lengths.unsqueeze(1)).float()
    kl = estimate(logprobs, reference, kl_estimator(block)) * mask
    entering = shaped(scores, lengths, ended, block, running)
    rewards = token_rewards(kl, entering, lengths, coef if place == "reward" else 0.0)
    baseline = torch.zeros_like(scores)
    if judged.greedy is not None:
        greedy, length, stopped = (gather(column) for column in judged.greedy)
        baseline = shaped(greedy, length, stopped, block, running)
    given = Given(rewards, values, mask, baseline, block.samples_per_prompt, block.gamma, block.lam, block.group_std)
    advantages, returns = estimator.compute(given)
    if estimator.whiten if block.whiten is None else block.whiten:
        advantages = whiten(advantages, mask)
    return Experience(
        tokens=gather(rollout.tokens),
        prompt_lengths=gather(rollout.prompt_lengths),
        lengths=lengths,
        ended=ended,
        mask=mask,
        logprobs=logprobs,
        reference=reference,
        values=values,
        kl=kl,
        advantages=advantages,
        returns=torch.zeros_like(values) if returns is None else returns,
        scores=scores,
        parts={name: gather(part) for name, part in judged.parts.items()},
    )


def kl_place(block: Ppo) -> str:
    """Where the KL penalty goes: `reward` or `loss`."""
    return block.kl.place or ESTIMATORS[block.advantage_estimator].kl


def kl_estimator(block: Ppo) -> str:
    """The recipe's estimator, else k1 in the reward and k3 in the loss, as GRPO has it.

    The gradient of k1 there is zero in the mean; that of k3 is, on policy, the gradient of KL(reference || policy).
    """
    return block.kl.estimator or ("k1" if kl_place(block) == "reward" else "k3")
