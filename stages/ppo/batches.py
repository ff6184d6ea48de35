"""Micro-batches of rows of similar length, so that little of what is computed is padding."""

from __future__ import annotations

import torch
from torch import Tensor


def by_length(lengths: Tensor, size: int) -> list[Tensor]:
    """Row numbers int64, longest first, `size` at a time; `lengths` [B] counts all tokens of a row."""
    return list(lengths.argsort(descending=True, stable=True).split(size))


def restored(pieces: list[Tensor], index: list[Tensor]) -> Tensor:
    """What was computed for the rows of `index`, in the order of the rows again."""
    joined = torch.cat(pieces)
    whole = torch.empty_like(joined)
    whole[torch.cat(index)] = joined
    return whole


def dealt(lengths: Tensor, rank: int, world: int, size: int) -> list[Tensor]:
    """This rank's micro-batches of `size` rows. Rows are dealt to the ranks longest first and in turns (0, 1, 1, 0, …), so
    that all have about as much to do; there are as many rows for each, and `lengths` [B] divides by `world`."""
    rounds = lengths.argsort(descending=True, stable=True).view(-1, world)
    turned = torch.where(
        (torch.arange(len(rounds), device=lengths.device) % 2 == 1).unsqueeze(1), rounds.flip(1), rounds
    )
    return list(turned[:, rank].split(size))
