"""From a rollout to what the update learns from: log-probabilities, KL, scores, values, advantages, returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import Ppo
from pipeline.generation.rollout import Rollout
from stages.ppo import advantage
from stages.ppo.kl import estimate


@dataclass(frozen=True)
class Judged:
    """One rank's rollout with what the roles say of it. B is this rank's rows.

    logprobs, reference, values, entropy  float32 [B, T], 0 past each response
    scores                                float32 [B], raw, as the reward model gives them
    """

    rollout: Rollout
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Experience:
    """The rollout batch of all ranks, in prompt order, the same on every rank. B is the global batch.

    tokens int64 [B, L]; prompt_lengths, lengths int64 [B]; ended bool [B]; mask, logprobs, values, kl, advantages, returns,
    entropy float32 [B, T]; scores float32 [B] as the reward model gives them.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    ended: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    entropy: Tensor
    scores: Tensor

    def rows(self, index: Tensor) -> Experience:
        """Some rows, cut to the longest of them."""
        length = int((self.prompt_lengths[index] + self.lengths[index]).max())
        width = int(self.lengths[index].max())
        cut = {"tokens": length}
        return Experience(
            **{
                f.name: value[index, : cut.get(f.name, width)]
                if (value := getattr(self, f.name)).dim() == 2
                else value[index]
                for f in fields(self)
            }
        )


def judge(engine: Any, rollout: Rollout, temperature: float, micro_batch: int) -> Judged:
    """Let policy, reference, critic and reward read the rollout, `micro_batch` rows at a time."""
    width, parts = rollout.logprobs.shape[1], []
    with engine.module.evaluating():
        for start in range(0, len(rollout.lengths), micro_batch):
            rows = slice(start, start + micro_batch)
            tokens, prompts, lengths = rollout.tokens[rows], rollout.prompt_lengths[rows], rollout.lengths[rows]
            logprobs, entropy = engine("log_probs", "policy", tokens, prompts, width, temperature)
            reference, _ = engine("log_probs", "reference", tokens, prompts, width, temperature)
            values = engine("values", "critic", tokens, prompts, width)
            scores = engine("scores", "reward", tokens, prompts + lengths)
            parts.append((logprobs, reference, values, entropy, scores))
    logprobs, reference, values, entropy, scores = (torch.cat(column) for column in zip(*parts, strict=True))
    mask = rollout.mask
    return Judged(rollout, logprobs * mask, reference * mask, values * mask, entropy * mask, scores)


def experience(judged: Judged, block: Ppo, coef: float) -> Experience:
    """Gather all ranks' rows and turn them into advantages and returns (section 6 of the design, steps 2 to 4)."""
    rollout = judged.rollout
    lengths, ended = gather(rollout.lengths), gather(rollout.ended)
    logprobs, reference, values = gather(judged.logprobs), gather(judged.reference), gather(judged.values)
    scores = gather(judged.scores)
    mask = (torch.arange(logprobs.shape[1], device=lengths.device) < lengths.unsqueeze(1)).float()
    kl = estimate(logprobs, reference, block.kl.estimator) * mask
    rewards = advantage.token_rewards(kl, shaped(scores, ended, block), lengths, coef)
    advantages, returns = advantage.gae(rewards, values, mask, block.gamma, block.lam)
    if block.whiten:
        advantages = advantage.whiten(advantages, mask)
    return Experience(
        gather(rollout.tokens),
        gather(rollout.prompt_lengths),
        lengths,
        ended,
        mask,
        logprobs,
        values,
        kl,
        advantages,
        returns,
        gather(judged.entropy),
        scores,
    )


def shaped(scores: Tensor, ended: Tensor, block: Ppo) -> Tensor:
    """Scores as they enter the reward, [B]: clipped, then less the penalty for a response that never ended."""
    if block.score_clip is not None:
        scores = torch.clamp(scores, -block.score_clip, block.score_clip)
    return scores - block.missing_eos_penalty * (~ended).to(scores.dtype)


def gather(local: Tensor) -> Tensor:
    """All ranks' rows in rank order, on every rank; columns are padded with zeros to the widest rank's."""
    world = dist.get_world_size()
    if world == 1:
        return local
    if local.dim() == 2:
        width = torch.tensor([local.shape[1]], device=local.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        local = torch.nn.functional.pad(local, (0, int(width) - local.shape[1]))
    sent = local.to(torch.uint8) if local.dtype == torch.bool else local
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent.contiguous())
    return torch.cat(parts).to(local.dtype)
