"""Micro-batches of rows of similar length, at most a budget of tokens each, so that little of what is computed is padding."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import Ppo

CUT = 32
"""What a micro-batch costs beside its tokens, in tokens: below that it is cheaper to pad."""


def micro_batch(block: Ppo, world: int) -> tuple[int, int]:
    """(rows, tokens) that a micro-batch holds at most: rows of full length, and the tokens of so many."""
    share = block.rollout_batch // block.minibatches // world
    rows = min(block.micro_batch or 16, share)
    return rows, rows * (block.sampling.max_prompt_length + block.sampling.max_response_length)


def by_length(lengths: Tensor, budget: int) -> list[Tensor]:
    """This rank's row numbers int64, longest first, cut into micro-batches; as many of them, and as large, on every rank.

    `lengths` [B] counts all tokens of a row, B being the same on every rank. Collective.
    """
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return list(order.split(sizes(longest.tolist(), budget)))


def dealt(lengths: Tensor, rank: int, world: int, budget: int) -> list[Tensor]:
    """This rank's micro-batches of rows that all ranks know. Rows are dealt to the ranks longest first and in turns
    (0, 1, 1, 0, …), so that all have about as much to do; there are as many rows for each, and `lengths` [B] divides by
    `world`."""
    rounds = lengths.argsort(descending=True, stable=True).view(-1, world)
    turned = torch.where(
        (torch.arange(len(rounds), device=lengths.device) % 2 == 1).unsqueeze(1), rounds.flip(1), rounds
    )
    return list(turned[:, rank].split(sizes(lengths[rounds[:, 0]].tolist(), budget)))


def restored(pieces: list[Tensor], index: list[Tensor]) -> Tensor:
    """What was computed for the rows of `index`, in the order of the rows again."""
    joined = torch.cat(pieces)
    whole = torch.empty_like(joined)
    whole[torch.cat(index)] = joined
    return whole


def sizes(lengths: list[int], budget: int) -> list[int]:
    """Rows of each micro-batch: of all cuts of rows sorted by length (longest first) the one that computes fewest tokens,
    padding included and `CUT` for each micro-batch, none of more than `budget` tokens unless it is one row."""
    count = len(lengths)
    cost, following = [0.0] * (count + 1), [count] * (count + 1)
    for first in range(count - 1, -1, -1):
        most = max(1, budget // max(lengths[first], 1))
        ends = range(first + 1, min(count, first + most) + 1)
        costs = [lengths[first] * (end - first) + cost[end] for end in ends]
        cost[first] = CUT + min(costs)
        following[first] = ends[costs.index(min(costs))]
    found, first = [], 0
    while first < count:
        found.append(following[first] - first)
        first = following[first]
    return found
