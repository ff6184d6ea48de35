"""Log-probabilities and entropies of tokens from hidden states, a chunk of tokens at a time.

Logits are the largest tensor of RLHF by far: [batch, tokens, vocabulary] in float32. Here they exist for one chunk. Through
a head that does not train they are computed once, the gradient beside them; else again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.adapters.new_rows import plain

CHUNK_ELEMENTS = 2**24
"""Logits held at a time: 64 MiB in float32."""

SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which a model changes its logits after the output head."""


def plain_head(model: Any) -> bool:
    """Whether the model's logits are its output head's, as nearly always."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in SCALED)


def token_log_probs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    learn_entropy: bool,
    recompute: Callable[..., Any],
    together: bool,
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy), float32 [N], from hidden states [N, H] and targets int64 [N].

    The entropy has gradients only if `learn_entropy`. `recompute(function, *inputs)` calls `function`, and again in the
    backward pass. `together` makes the number of calls of `head` the same on every rank, as ZeRO-3 needs; collective then.
    """

    def chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return of_logits(head(states), wanted, temperature, learn_entropy=learn_entropy)

    size = max(1, CHUNK_ELEMENTS // int(plain(head).out_features))
    chunks = -(-len(hidden) // size)
    if together:
        most = torch.tensor([chunks], device=hidden.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        chunks = int(most)
    learning = torch.is_grad_enabled() and hidden.requires_grad
    trained = any(parameter.requires_grad for parameter in head.parameters())
    if learning and not trained and not learn_entropy and not together:
        chosen, entropy = _FrozenHead.apply(hidden, head, targets, temperature, size)
        return chosen, entropy
    if chunks == 1:
        return chunk(hidden, targets)
    if together and trained:
        return chunk(hidden, targets)  # ZeRO-3 keeps one gradient of a weight in a backward pass, not a sum over chunks
    pieces = []
    for number in range(chunks):
        part = slice(number * size, (number + 1) * size)
        inputs = hidden[part], targets[part]
        pieces.append(recompute(chunk, *inputs) if learning else chunk(*inputs))
    chosen, entropy = zip(*pieces, strict=True)
    return torch.cat(chosen), torch.cat(entropy)


class _FrozenHead(torch.autograd.Function):
    """`token_log_probs` through a head that does not train. The gradient of log p(target) with respect to the hidden state is
    (W[target] - p W) / temperature; it is computed while p is there, and is no larger than the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Any, targets: Tensor, temperature: float, size: int
    ) -> tuple[Tensor, Tensor]:
        picked, spread, slopes = [], [], []
        for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logprobs = tempered(head(states), temperature)
            logprobs -= logprobs.logsumexp(-1, keepdim=True)
            picked.append(logprobs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
            shares = logprobs.exp()
            slopes.append((head.weight[wanted] - shares.to(head.weight.dtype) @ head.weight) / temperature)
            spread.append(-logprobs.mul_(shares).sum(-1))
        entropy = torch.cat(spread)
        ctx.save_for_backward(torch.cat(slopes))
        ctx.mark_non_differentiable(entropy)
        return torch.cat(picked), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(-1) * slopes).to(slopes.dtype), None, None, None, None


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """`logits` of any float dtype in float32 and over the temperature; finite where they were, though that be the smallest
    number there is, as an added token's."""
    scaled = logits.float() / temperature
    return scaled.clamp_(min=torch.finfo(torch.float32).min) if temperature < 1 else scaled


def of_logits(logits: Tensor, targets: Tensor, temperature: float, *, learn_entropy: bool) -> tuple[Tensor, Tensor]:
    """The same from logits [N, V] of any float dtype."""
    scaled = tempered(logits, temperature)
    normaliser = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
    with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):
        entropy = normaliser - (scaled.softmax(-1) * scaled).sum(-1)
    return chosen, entropy
