"""The canary: does a run see its own policy? Asked at start-up and after every resume (section 7 of the design)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.encode import Prompt
from pipeline.generation.rollout import Rollout

if TYPE_CHECKING:
    from stages.ppo.train import Loop

TOLERANCE = {"fp32": 1e-3, "bf16": 0.08, "fp16": 0.02}
"""Largest mean difference, in nats per token, between rollout and training log-probabilities; a wrong position or mask
gives tenths of a nat or more."""


def canary(loop: Loop, prompts: list[Prompt], rollout: Rollout, logprobs: Tensor) -> str | None:
    """What is wrong, the same on every rank, or None.

    `logprobs` [B, T] are the training forward's of this rank's `rollout` of the step's `prompts`.
    """
    limit = TOLERANCE[loop.block.base.dtype]
    difference = _most(loop, float((rollout.logprobs - logprobs).abs().sum() / rollout.mask.sum()))
    if not difference <= limit:
        return (
            f"rollout and training log-probabilities differ by {difference:.4f} nats per token, more than {limit} allows in "
            f"{loop.block.base.dtype}; the rollout engine and the training forward do not see the same positions, mask or "
            "adapter"
        )
    if _most(loop, float(_adapter_changes_nothing(loop, rollout))) > 0:
        return "the policy's trained adapter changes nothing; it is not the active one"
    gap = _most(loop, _greedy_gap(loop, prompts)) if loop.block.sampling.engine != "hf" else 0.0
    if gap > limit:
        return (
            f"greedy decoding by the {loop.block.sampling.engine} engine leaves Hugging Face's at a token that is "
            f"{gap:.4f} nats more likely than the one it took, more than {limit} allows in {loop.block.base.dtype}"
        )
    return None


def _most(loop: Loop, value: float) -> float:
    """The largest of all ranks' values; NaN where any is."""
    shared = torch.tensor([value if value == value else float("inf")], device=loop.engine.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


def _adapter_changes_nothing(loop: Loop, rollout: Rollout) -> bool:
    """Whether the policy reads some rows exactly as its base does (or, once it has trained, as the reference does)."""
    bare = "base" if "base" in loop.engine.module.roles else "reference"
    if bare == "reference":
        block = loop.block
        updates = (loop.step - block.freezing_actor_steps) * block.epochs * block.minibatches
        if block.base.dtype != "fp32" or updates < 2:  # no update yet that moved it, or none that 16 bits must show
            return False
    rows = torch.arange(min(loop.update.rows, len(rollout.lengths)), device=rollout.lengths.device)
    tokens, starts, lengths = rollout.rows(rows)
    asked = (tokens, starts, lengths, int(lengths.max()), loop.block.sampling.temperature)
    with loop.engine.module.evaluating():
        ours, _ = loop.engine("log_probs", "policy", *asked)
        theirs, _ = loop.engine("log_probs", bare, *asked)
    return torch.equal(ours, theirs)


def _greedy_gap(loop: Loop, prompts: list[Prompt]) -> float:
    """By how many nats Hugging Face's greedy token is likelier than the recipe's engine's, where they first part; 0 where
    they never do."""
    few = prompts[: 4 * loop.world]
    few = few[: len(few) // loop.world * loop.world]
    if not few:
        return 0.0
    reference = loop.block.sampling.model_copy(update={"engine": "hf"})
    ours = loop.sample(few, 0, greedy=True)
    theirs = loop.sample(few, 0, greedy=True, sampling=reference)
    likely = []
    with loop.engine.module.evaluating():
        for side in (ours, theirs):
            width = side.logprobs.shape[1]
            asked = (side.tokens, side.prompt_lengths, side.lengths, width, loop.block.sampling.temperature)
            likely.append(loop.engine("log_probs", "policy", *asked)[0])
    worst = 0.0
    for row in range(len(ours.lengths)):
        pairs = zip(ours.response(row), theirs.response(row), strict=False)
        parting = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if parting is not None:
            worst = max(worst, float(likely[1][row, parting] - likely[0][row, parting]))
    return worst
