"""BitFit: train the biases alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.tuner import (
    Component,
    MethodConfig,
    Tuner,
    base_modules,
    check_names,
    features,
    named,
    register,
    text_config,
)
from pipeline.errors import UserError

HEADS = ("lm_head", "score", "classifier", "embed_out", "qa_outputs")


@dataclass
class BitFitConfig(MethodConfig):
    """BitFit, Ben Zaken et al. 2106.10199: a change of every bias of the base, which starts as zero.

    `target_modules` None takes every module with a bias, layer norms too, but output heads. `add_missing` gives linear layers
    without one (all of Llama's) a bias of zeros to change. The change is kept apart from the bias, so that several adapters
    share a base; merging adds it (and creates the bias).

    What trains: the sum of these modules' output widths.
    """

    add_missing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BITFIT")


class BiasDelta(Component):
    """y + delta, delta [out] from zero."""

    mergeable = True

    def __init__(self, out: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(out))
        self._merged: list[Tensor | None] = []  # the bias before each merge, to be put back as it was

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        return output + self.delta.to(output.dtype)

    def merge_into(self, base: nn.Module) -> None:
        bias: Any = base.bias
        self._merged.append(None if bias is None else bias.data.clone())
        if bias is None:
            base.bias = nn.Parameter(self.delta.detach().clone(), requires_grad=False)
        else:
            bias.data += self.delta.data.to(bias.dtype)

    def unmerge_from(self, base: nn.Module) -> None:
        was = self._merged.pop()
        if was is None:
            base.bias = None
        else:
            base.bias.data.copy_(was)


class BitFitModel(Tuner):
    """The tuner of `BitFitConfig`."""

    prefix = "bitfit_"

    def targets(self, config: BitFitConfig) -> list[str]:
        check_names("bitfit", "target_modules", config.target_modules, self.model)
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        modules = base_modules(self.model)
        able = {name for name, module in modules.items() if _has_bias(module, config.add_missing)}
        if config.target_modules is None:
            free = {name for name in able if modules[name] is not head and not named(name, [*HEADS])}
            if not free:
                raise UserError(
                    "bitfit", f"{type(self.model).__name__} has no biases", fix="set add_missing: true, or use lora"
                )
            return sorted(free)
        for name in modules:
            if named(name, config.target_modules) and name not in able:
                raise UserError("bitfit.target_modules", f"{name} has no bias", fix="set add_missing, or leave it out")
        return config.target_modules

    def component(self, config: BitFitConfig, adapter: str, name: str, module: nn.Module) -> BiasDelta:
        bias = module._parameters.get("bias")
        if bias is None:
            return BiasDelta(features(module, text_config(self.model).hidden_size)[1])
        return BiasDelta((bias.ds_shape if hasattr(bias, "ds_shape") else bias.shape)[0])


def _has_bias(module: nn.Module, add_missing: bool) -> bool:
    """Whether adding to the module's output is adding to a bias of it."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        return False
    bias = module._parameters.get("bias")
    return bias is not None or (add_missing and isinstance(module, nn.Linear | Conv1D))


register("bitfit", BitFitConfig, BitFitModel)
