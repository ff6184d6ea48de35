"""Rows of the embeddings that train beside an adapter: those of tokens that the recipe added, as PEFT's
`trainable_token_indices` has them.

In a forward pass PEFT copies the whole matrix, reads it where ZeRO-3 has not gathered it, and goes past the hooks of the layer
below. `Rows` computes the same from the layer's own output; the files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftConfig
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper
from peft.utils.integrations import check_deepspeed_zero3_enabled
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import UserError

DELTA = "trainable_tokens_delta"


def indices(model: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for `tokens` of the transformers model `model`: rows of the input embeddings and, where
    it has a head of its own weights, of the output embeddings. PEFT keeps tied ones one."""
    if not tokens:
        return None
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [into] if out is None or plain(out).weight is plain(into).weight else [into, out]
    if getattr(plain(out), "bias", None) is not None:
        raise UserError(
            "base.add_tokens",
            f"{type(model).__name__} has an output head with a bias, which PEFT leaves out beside rows of their own",
            fix="write `adapter: {method: full}`, or add no tokens",
        )
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)].rpartition(".")[2]: list(tokens) for layer in layers}


def tokens_of(config: PeftConfig) -> list[int]:
    """The tokens whose rows an adapter with this configuration holds."""
    found = getattr(config, "trainable_token_indices", None) or []
    return list(next(iter(found.values()))) if isinstance(found, dict) else list(found)


def plain(layer: Any) -> Any:
    """The embedding or head below the rows of adapters."""
    return getattr(layer, "token_adapter", layer).get_base_layer() if hasattr(layer, "token_adapter") else layer


def fitting(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` of an adapter without rows of layers that `model` does not have: a classifier has no output embeddings."""
    held = {name for name, _ in model.named_modules()}
    return {key: value for key, value in weights.items() if DELTA not in key or key.rpartition(f".{DELTA}")[0] in held}


@contextmanager
def readable() -> Iterator[None]:
    """While adapters are added, read the rows they start from on any device: PEFT's own function for ZeRO-3 is for CUDA."""

    def collect(layer: TrainableTokensLayer, weight: Tensor, rows: list[int], width: int) -> Tensor:
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            return weight[rows].detach().clone()

    own = TrainableTokensLayer._collect_token_weights
    TrainableTokensLayer._collect_token_weights = collect
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = own


def refine(model: nn.Module) -> None:
    """Compute the rows of `model` as `Rows` does. Again after every adapter that is added."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.__dict__["bias"] = None  # TRL's loss asks an output head for it, and the wrapper does not answer
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = Rows
            if check_deepspeed_zero3_enabled():
                for rows in module.trainable_tokens_delta.values():
                    deepspeed.zero.register_external_parameter(module, rows)


class Rows(TrainableTokensLayer):
    """An embedding or output head of which the active adapter has some rows of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Ids [..., L] to embeddings [..., L, D], or hidden states [..., D] to logits [..., V]."""
        found = self.base_layer(x, *args, **kwargs)
        for adapter in () if self.disable_adapters else self.active_adapters:
            if adapter in self.trainable_tokens_delta:
                found = self.put(adapter, x, found)
        return found

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """The whole matrix, as TRL's loss reads it from an output head."""
        there = ZeroParamStatus.AVAILABLE
        held = [self.base_layer.weight, *(self.trainable_tokens_delta[name] for name in active_adapters)]
        absent = [rows for rows in held if getattr(rows, "ds_status", there) != there]
        with deepspeed.zero.GatheredParameters(absent, enabled=bool(absent)):
            merged = super().get_merged_weights(active_adapters)
        merged.ds_status = there  # under ZeRO-3 TRL gathers what does not say so
        return merged

    def put(self, adapter: str, x: Tensor, found: Tensor) -> Tensor:
        """`found`, which the layer makes of `x`, with what the rows of `adapter` make of it."""
        rows, tokens = self.trainable_tokens_delta[adapter], self._tokens(adapter, x.device)
        if isinstance(self.base_layer, nn.Embedding):
            chosen = x.unsqueeze(-1) == tokens
            own = functional.embedding(chosen.long().argmax(-1), rows) * getattr(self.base_layer, "embed_scale", 1.0)
            return torch.where(chosen.any(-1, keepdim=True), own.to(found.dtype), found)
        said = functional.linear(x, rows.to(x.dtype)).to(found.dtype)
        return found.index_copy(-1, tokens, said)

    def _tokens(self, adapter: str, device: torch.device) -> Tensor:
        """The tokens, int64 [n]; on a GPU they are there once, before a graph is captured."""
        held: dict[tuple[str, str], Tensor] = self.__dict__.setdefault("_held", {})
        key = (adapter, str(device))
        if key not in held:
            held[key] = torch.tensor(self.token_indices[adapter], device=device)
        return held[key]
