"""PPO's clipped losses, per token; the caller sums over the mask and divides by the tokens of the whole minibatch."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, clipped), [B, T]: max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(logprobs - old).

    `clipped` is 1.0 where the clipped branch is the larger one. Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = torch.exp(logprobs - old)
    plain, bounded = -advantages * ratio, -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    return torch.maximum(plain, bounded), (bounded > plain).float()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, clipped), [B, T]: half the larger of the squared errors of the value and of the value kept near the old one."""
    near = torch.clamp(values, old - clip, old + clip)
    plain, bounded = (values - returns).pow(2), (near - returns).pow(2)
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).float()
