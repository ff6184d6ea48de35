"""A language model to sample from: the adapter in its weights, all of them on this rank, for as long as a rollout takes.

The trained weights are never merged into. Layers without an adapter are shared with the trained model, except under ZeRO-3,
where every weight is gathered once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


class Whole:
    """The modules of `model` once more, around the same parameters, those of added tokens included. Must be made before
    DeepSpeed adds its hooks to them."""

    def __init__(self, model: Any) -> None:
        own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, dict(own)).eval()
        for twin, original in zip(self.model.modules(), model.modules(), strict=True):
            twin._buffers = original._buffers  # one dictionary: DeepSpeed moves buffers to a device by replacing them
        self.tuned: dict[nn.Module, BaseTunerLayer] = {}
        self.rows = [layer for layer in self.model.modules() if isinstance(layer, TrainableTokensLayer)]
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, BaseTunerLayer) and layer not in self.rows:
                plain = _plain(layer.get_base_layer())
                self.tuned[plain] = layer
                self.model.set_submodule(name, plain)

    @staticmethod
    def possible(model: Any) -> bool:
        """Whether every adapter of `model` adds a matrix to a weight that can be told; PEFT's 4-bit AdaLoRA cannot tell it."""
        tuned = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        return all(hasattr(layer, "get_delta_weight") or isinstance(layer, TrainableTokensLayer) for layer in tuned)

    @contextmanager
    def of(self, adapter: str | None, *, sharded: bool) -> Iterator[Any]:
        """The model with the weights as they are now, `adapter` (or none) merged: a copy of each adapted layer's, and of all
        the others too when they are `sharded` (collective then)."""
        shared = [
            (module, name, value) for module in self.model.modules() for name, value in module._parameters.items()
        ]
        for layer in self.rows:
            layer._disable_adapters, layer._active_adapter = adapter is None, [adapter]
        try:
            with torch.no_grad():
                if sharded:
                    self._gather()
                for plain, layer in self.tuned.items():
                    plain._parameters["weight"] = nn.Parameter(_merged(layer, adapter), requires_grad=False)
            yield self.model
        finally:
            for module, name, value in shared:
                module._parameters[name] = value

    def _gather(self) -> None:
        """A whole copy of every parameter but those that are merged anyway; tied ones stay one."""
        whole: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, value in module._parameters.items():
                if value is None or (module in self.tuned and name == "weight"):
                    continue
                if id(value) not in whole:
                    with _available([value]):
                        fresh = nn.Parameter(value.detach().clone(), requires_grad=False)
                    if hasattr(value, "quant_state"):
                        fresh.quant_state = value.quant_state  # type: ignore[attr-defined]
                    whole[id(value)] = fresh
                module._parameters[name] = whole[id(value)]


def _plain(base: Any) -> nn.Module:
    """The layer below an adapter; for packed weights a plain one that takes their values."""
    if not hasattr(base.weight, "quant_state"):
        return base
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.in_features, plain.out_features = base.in_features, base.out_features
    plain._parameters["bias"] = base.bias
    return plain


def _merged(layer: Any, adapter: str | None) -> Tensor:
    """W + BA, added in float32, in W's dtype (the adapter's where W is packed)."""
    base = layer.get_base_layer()
    with _available(list(layer.parameters())):
        packed = hasattr(base.weight, "quant_state")
        weight = dequantize_module_weight(base).detach() if packed else base.weight.detach()
        if adapter is None:
            return weight.clone()
        return (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)


def _available(parameters: list[Any]) -> Any:
    """The parameters whole, where ZeRO-3 shards them."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded))
