"""What a rollout is, and the noise it is sampled with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import Sampling


@dataclass(frozen=True)
class Rollout:
    """B sampled responses of up to T tokens.

    tokens          int64 [B, L]   prompt, then response, padded on the right
    prompt_lengths  int64 [B]
    lengths         int64 [B]      response tokens up to and including EOS, or all T when truncated; at least 1
    logprobs        float32 [B, T] of each sampled token at the sampling temperature, before top-k and top-p; 0 past the end
    ended           bool [B]       whether the response ended by EOS
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    logprobs: Tensor
    ended: Tensor

    @property
    def mask(self) -> Tensor:
        """float32 [B, T]: 1 on response tokens, from lengths and never from token ids."""
        steps = torch.arange(self.logprobs.shape[1], device=self.lengths.device)
        return (steps < self.lengths.unsqueeze(1)).float()

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, prompt_lengths, lengths) of some rows, tokens cut to the longest of them."""
        prompts, lengths = self.prompt_lengths[index], self.lengths[index]
        return self.tokens[index, : int((prompts + lengths).max())], prompts, lengths

    def without_first(self, count: int) -> Rollout:
        """The same without the first `count` tokens of every prompt."""
        return replace(self, tokens=self.tokens[:, count:], prompt_lengths=self.prompt_lengths - count)

    def response(self, row: int) -> list[int]:
        start = int(self.prompt_lengths[row])
        return [int(t) for t in self.tokens[row, start : start + int(self.lengths[row])]]


def join(parts: list[Rollout], pad: int) -> Rollout:
    """Rollouts one after another, padded to the longest."""
    length = max(p.tokens.shape[1] for p in parts)
    width = max(p.logprobs.shape[1] for p in parts)
    return Rollout(
        torch.cat([F.pad(p.tokens, (0, length - p.tokens.shape[1]), value=pad) for p in parts]),
        torch.cat([p.prompt_lengths for p in parts]),
        torch.cat([p.lengths for p in parts]),
        torch.cat([F.pad(p.logprobs, (0, width - p.logprobs.shape[1])) for p in parts]),
        torch.cat([p.ended for p in parts]),
    )


def pick(logprobs: Tensor, keys: Tensor | None, sampling: Sampling) -> Tensor:
    """One token per row of `logprobs` float32 [B, V]: sampled, or the likeliest where `keys` is None; int64 [B].

    The inverse of the cumulative distribution at one number per row that is a pure function of its key (int64 [B]): a token
    depends on its key and its distribution alone, not on ranks, batching or order.
    """
    if keys is None:
        return logprobs.argmax(-1)
    cumulative = truncated(logprobs, sampling).exp().cumsum(-1, dtype=torch.float64)
    uniform = (_mix(keys).double() + 0.5) / 4294967296.0
    chosen = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=logprobs.shape[1] - 1)  # NaN, which the caller refuses, is past the end


def truncated(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """`logprobs` [B, V] with -inf outside the top-k tokens, then outside the smallest set whose probability reaches top-p,
    then where the probability is below min-p times the largest (Nguyen et al. 2024, arXiv 2407.01082)."""
    if sampling.top_k:
        lowest = logprobs.topk(min(sampling.top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < lowest, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, index = logprobs.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(drop, float("-inf"))
    if sampling.min_p > 0.0:
        floor = logprobs.max(-1, keepdim=True).values + math.log(sampling.min_p)
        logprobs = logprobs.masked_fill(logprobs < floor, float("-inf"))
    return logprobs


def keys(seed: int, step: int, prompts: Tensor, sample: Tensor) -> Tensor:
    """One key per row, int64 [B], from the run's seed, the step, the prompt's number in the stream and the sample's."""
    key = torch.full_like(prompts, seed & 0xFFFFFFFF)
    for part in (torch.full_like(prompts, step), prompts, sample):
        key = _mix(key ^ _mix((part + 0x85EBCA6B) & 0xFFFFFFFF))
    return key


def at_position(keys: Tensor, position: int | Tensor) -> Tensor:
    """The keys of one position of the responses, or of a position for each row, int64 [B]."""
    return _mix(keys ^ _mix((torch.as_tensor(position, device=keys.device) + 0xC2B2AE35) & 0xFFFFFFFF))


def _mix(x: Tensor) -> Tensor:
    """Wellons' lowbias32 on the low 32 bits of int64; products wrap, and only their low 32 bits are kept."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
