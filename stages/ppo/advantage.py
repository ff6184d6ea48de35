"""Rewards to advantages: generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) and whitening."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(kl: Tensor, scores: Tensor, lengths: Tensor, coef: float) -> Tensor:
    """Per-token rewards, float32 [B, T]: -coef * kl on every token, plus the score on the last response token.

    `kl` [B, T] is zero past each response, `scores` [B], `lengths` [B] counts response tokens (EOS included, at least 1).
    """
    rewards = -coef * kl
    return rewards.scatter_add(1, (lengths - 1).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), float32 [B, T], zero where `mask` is zero; the value after the last token is zero.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t, before any whitening.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        running = (rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """`values` with masked mean 0 and Bessel-corrected variance 1 over the whole [B, T]; zero where `mask` is zero."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).pow(2) * mask).sum() / torch.clamp(count - 1, min=1)
    return (values - mean) * torch.rsqrt(variance + eps) * mask
