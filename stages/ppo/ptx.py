"""The supervised loss that is mixed into every update (PPO-ptx; Ouyang et al. 2022, arXiv 2203.02155, equation 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Ptx
from stages.ppo.stream import Stream


class Mixture:
    """Rows `{input_ids, labels}` of the recipe's `ptx.data`, cut into minibatches, ranks and micro-batches as rollouts are."""

    def __init__(self, block: Ptx, rows: Any, seed: int, steps: int, pad: int) -> None:
        self.block, self.stream, self.steps, self.pad = block, Stream(rows, seed), steps, pad

    def coef(self, step: int) -> float:
        """The loss's weight at `step` (from 0): linear from `coef` to `final_coef` at the last step."""
        block = self.block
        if block.final_coef is None or self.steps < 2:
            return block.coef
        return block.coef + (block.final_coef - block.coef) * step / (self.steps - 1)

    def parts(self, minibatch: int, rank: int, world: int, size: int) -> tuple[list[list[dict[str, list[int]]]], int]:
        """(this rank's rows of minibatch number `minibatch`, `size` at a time, and its target tokens on all ranks)."""
        rows = self.stream.take(minibatch * self.block.batch, self.block.batch)
        mine = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
        tokens = sum(len(row["labels"]) - _first_target(row) for row in rows)
        return [mine[start : start + size] for start in range(0, len(mine), size)], tokens

    def loss(self, engine: Any, rows: list[dict[str, list[int]]]) -> Tensor:
        """Summed negative log-likelihood in nats of the rows' target tokens under the policy."""
        length = max(len(row["input_ids"]) for row in rows)
        tokens = torch.tensor([row["input_ids"] + [self.pad] * (length - len(row["input_ids"])) for row in rows])
        first = torch.tensor([_first_target(row) for row in rows])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows]) - first
        asked = (column.to(engine.device) for column in (tokens, first, lengths))
        logprobs, _ = engine("log_probs", "policy", *asked, int(lengths.max()), 1.0)
        return -logprobs.sum()


def _first_target(row: dict[str, list[int]]) -> int:
    """Place of the first token a loss is taken of; the very first token has nothing to be predicted from."""
    return max(1, next(i for i, label in enumerate(row["labels"]) if label != -100))
