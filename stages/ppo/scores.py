"""From raw scores to what enters the reward: running normalisation, clip, penalties (section 6 of the design, step 3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Ppo


@dataclass
class RunningScores:
    """Mean and variance of all scores so far, float64 (Chan, Golub and LeVeque 1979: batches are merged exactly)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor) -> None:
        """Take in a batch [B]."""
        new = scores.double()
        count, mean = new.numel(), float(new.mean())
        total, step = self.count + count, mean - self.mean
        self.squares += float((new - mean).pow(2).sum()) + step**2 * self.count * count / total
        self.mean += step * count / total
        self.count = total

    def normalise(self, scores: Tensor) -> Tensor:
        """`scores` [B] less the mean, over the Bessel-corrected standard deviation (1 while there is none)."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return (scores - self.mean) / (variance**0.5 if variance > 0 else 1.0)

    def state(self) -> dict[str, Any]:
        return asdict(self)


def shaped(scores: Tensor, lengths: Tensor, ended: Tensor, block: Ppo, running: RunningScores | None = None) -> Tensor:
    """Scores as they enter the reward, [B]: normalised, clipped, less the penalties for no EOS and for length.

    `lengths` [B] counts response tokens, `ended` [B] says whether the last of them is EOS.
    """
    if running is not None:
        scores = running.normalise(scores)
    if block.score_clip is not None:
        scores = torch.clamp(scores, -block.score_clip, block.score_clip)
    scores = scores - block.missing_eos_penalty * (~ended).to(scores.dtype)
    if block.overlong is not None:
        scores = scores - block.overlong.penalty * overlong(
            lengths, block.sampling.max_response_length, block.overlong.buffer
        )
    return scores


def overlong(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """0 up to `longest` - `buffer` tokens, then rising linearly to 1 at `longest`, float32 [B]."""
    return ((lengths - (longest - buffer)).float() / buffer).clamp(0.0, 1.0)
