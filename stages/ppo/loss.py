"""PPO's losses per token; the caller weighs them by the mask and by how the minibatch is averaged."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, clipped), [B, T]: max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(logprobs - old).

    `clipped` is 1.0 where the clipped branch is the larger one. Schulman et al. 2017 (arXiv 1707.06347), equation 7. Where
    A < 0, `dual_clip` bounds the loss by -A dual_clip (Ye et al. 2020, arXiv 1912.09729, equation 5).
    """
    ratio = torch.exp(logprobs - old)
    plain, bounded = -advantages * ratio, -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    loss = torch.maximum(plain, bounded)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, (bounded > plain).float()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """(loss, clipped), [B, T]: half the larger of the squared errors of the value and of the value kept near the old one.

    Without `clip`, half the squared error.
    """
    plain = (values - returns).pow(2)
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain)
    bounded = (torch.clamp(values, old - clip, old + clip) - returns).pow(2)
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).float()


def token_weights(mask: Tensor, lengths: Tensor, sequences: int, tokens: float, aggregation: str) -> Tensor:
    """What each token's loss [B, T] counts in the mean over a minibatch of `sequences` responses with `tokens` tokens.

    `token`: every token the same, 1 / tokens. `sequence`: every response the same, 1 / (sequences x its length).
    """
    return mask / tokens if aggregation == "token" else mask / (sequences * lengths.unsqueeze(1).to(mask.dtype))
