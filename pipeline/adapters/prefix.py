"""Prefixes: learned keys and values before those of the text, in every layer (2101.00190).

They enter inside the attention function, after the cache: positions, cache, padding, and recomputed activations are those of
the base. A prefix component sits on the query projection, computes its columns when that runs, and the attention function
that runs next takes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.adapters.bottleneck import Gate, Wire
from pipeline.adapters.tuner import Component, TunerLayer, text_config
from pipeline.errors import UserError

ATTENTION = "relay_prefix"
"""The name of the attention function that knows prefixes: `sdpa`, and exactly that where no prefix is active."""


class Rows(nn.Module):
    """n learned vectors, [n, width]: a table, or what an MLP makes of one (its weights are shared by the rows)."""

    def __init__(self, table: Tensor, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.mlp = nn.Parameter(table), mlp

    def forward(self) -> Tensor:
        return self.table if self.mlp is None else self.mlp(self.table)


class Columns(NamedTuple):
    """What one prefix adds to an attention call: keys and values [heads, n, size], log gates [B, Q, 1] or None."""

    keys: Tensor
    values: Tensor
    log_gate: Tensor | None


class Prefix(Component):
    """`n` key and value columns for each of `heads` key-value heads of width `size`.

    Without an `encoder` the columns are the parameters (P-tuning v2, 2110.07602). With one, a table [n, width] goes through
    Linear, tanh, Linear of hidden width `encoder` (prefix tuning's reparametrisation, here one for each layer). Keys have no
    position: where the base rotates its keys (RoPE), these are not rotated. A gate
    weighs a token's attention to the prefix: exp of its attention scores there is multiplied by the gate.
    """

    def __init__(self, n: int, width: int, heads: int, size: int, encoder: int, *, gated: bool) -> None:
        super().__init__()
        self.shape = (n, 2, heads, size)
        out, mlp = 2 * heads * size, None
        if encoder:
            mlp = nn.Sequential(nn.Linear(width, encoder), nn.Tanh(), nn.Linear(encoder, out))
        self.rows = Rows(torch.randn(n, width if encoder else out) * 0.02, mlp)
        self.gate = Gate(width) if gated else None
        self.wire = Wire()

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        keys, values = self.rows().view(self.shape).permute(1, 2, 0, 3)
        self.wire.put(Columns(keys, values, None if self.gate is None else self.gate(given, log=True)))
        return output


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa`, with the columns of the active prefixes, if any, before the text's.

    query [B, heads, Q, size]; key, value [B, key-value heads, K, size]; mask True or 0 where a query sees a column,
    [B or 1, heads or 1, Q, K], or None: causal if the module is and Q > 1, else every column. Returns [B, Q, heads, size].
    """
    prefixes = _prefixes(module)
    if not prefixes:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias or a cap to its attention scores; prefixes know neither")
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:  # sdpa's own reading: a longer key is a static cache whose rest is empty
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        attention_mask = attention_mask.tril() if causal and query.shape[2] > 1 else attention_mask
    if any(columns.log_gate is not None for columns in prefixes):
        attention_mask = _additive(attention_mask, query)
    for columns in prefixes:
        attention_mask = torch.cat([_weights(columns, attention_mask), attention_mask], dim=-1)
        key, value = _before(columns.keys, key), _before(columns.values, value)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
    )


def _prefixes(module: nn.Module) -> list[Columns]:
    """What the active prefixes on the projections of this attention module have computed just now."""
    return [
        part.wire.take()
        for layer in module.children()
        if isinstance(layer, TunerLayer)
        for component in layer.active()
        for part in component.children()
        if isinstance(part, Prefix)
    ]


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """The mask as numbers to add to scores, [B, heads or 1, Q, K]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask.expand(query.shape[0], -1, query.shape[2], -1)


def _weights(columns: Columns, mask: Tensor) -> Tensor:
    """The prefix's part of the mask, [..., n]: seen by every query, at its gate where it has one."""
    shape = (*mask.shape[:3], columns.keys.shape[1])
    if columns.log_gate is None:
        return mask.new_full(shape, mask.dtype == torch.bool)
    return columns.log_gate.to(mask.dtype).unsqueeze(1).expand(shape)


def _before(prefix: Tensor, text: Tensor) -> Tensor:
    """[B, heads, n + K, size]; the prefix [heads, n, size] is every row's."""
    if prefix.shape[0] != text.shape[1] or prefix.shape[2] != text.shape[3]:
        raise UserError(
            "adapter",
            f"its prefixes have {prefix.shape[0]} key-value heads of width {prefix.shape[2]}",
            expected=f"{text.shape[1]} heads of width {text.shape[3]}, which a layer of this model has",
            fix="use a method without prefixes for this model",
        )
    return torch.cat([prefix.to(text.dtype).expand(text.shape[0], -1, -1, -1), text], dim=2)


def heads(model: Any) -> tuple[int, int]:
    """(key-value heads, width of one) of each layer, by the model's config."""
    config = text_config(model)
    number = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return number, size


def switch_on(model: Any) -> None:
    """Let `model` compute attention by the function above; raises UserError where it cannot."""
    config = text_config(model)
    if config._attn_implementation == ATTENTION:
        return
    name, reason = type(model).__name__, ""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reason = f"{name} caps its attention scores, which sdpa cannot"
    elif not getattr(model, "_supports_attention_backend", False) or not getattr(model, "_supports_sdpa", False):
        reason = f"{name} computes attention in its own way, not through transformers' attention interface"
    if reason:
        raise UserError("adapter with prefixes", reason, fix="use a method without prefixes, such as lora")
    if config._attn_implementation != "sdpa":
        raise UserError(
            "adapter with prefixes",
            f"the base was loaded with attention {config._attn_implementation}",
            expected="sdpa",
            fix="set base.attn_implementation: sdpa",
        )
    model.set_attn_implementation(ATTENTION)


def switch_off(model: Any) -> None:
    """Back to `sdpa`, once no layer has a prefix."""
    if text_config(model)._attn_implementation == ATTENTION:
        model.set_attn_implementation("sdpa")


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
