"""KL penalty: per-token estimators (Schulman, "Approximating KL divergence", 2020) and controllers of its coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.schema import Kl


def estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token KL(policy || reference) in nats, float32 [B, T], from log-probabilities of the sampled tokens [B, T].

    `k1` is log p - log q (unbiased, may be negative); `k3` is q/p - 1 - log(q/p) (unbiased, never negative).
    """
    log_ratio = reference - logprobs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


@dataclass
class Controller:
    """The coefficient beta: fixed, or adapted towards `target` (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""

    coef: float
    target: float | None
    horizon: int

    @classmethod
    def from_block(cls, block: Kl) -> Controller:
        return cls(block.coef, block.target, block.horizon)

    def update(self, kl: float, sequences: int) -> None:
        """Move the coefficient after `sequences` rollouts whose mean KL (summed over a sequence's tokens) was `kl`."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * sequences / self.horizon
