"""An endless, seeded stream over a list: of prompts, or of rows for a supervised loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


@dataclass
class Stream(Generic[Item]):
    """Every pass over `items` comes in a new order, which depends on the seed and the pass alone."""

    items: Sequence[Item]
    seed: int
    _order: tuple[int, list[int]] = (-1, [])

    def at(self, number: int) -> Item:
        """The item at place `number` of the stream."""
        turn, place = divmod(number, len(self.items))
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed((self.seed << 20) + turn)
            self._order = (turn, torch.randperm(len(self.items), generator=generator).tolist())
        return self.items[self._order[1][place]]

    def take(self, first: int, count: int) -> list[Item]:
        return [self.at(first + i) for i in range(count)]
