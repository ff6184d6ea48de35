"""BitFit: train the biases alone."""

from __future__ import annotations

import copy
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

    `target_modules` None takes every module with a bias, layer norms too, and every linear layer, but output heads; a linear
    layer without a bias (all of Llama's) gets one of zeros to change. The change is kept apart from the bias, so that
    several adapters share a base; merging adds it (and creates the bias).

    What trains: the sum of these modules' output widths.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BITFIT")


class BiasDelta(Component):
    """y + delta, delta [out] from zero."""

    mergeable = True

    def __init__(self, out: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(out))
        self._before: Tensor | None = None  # the bias before a merge, to be put back to the bit

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        return output + self.delta.to(output.dtype)

    def merge_into(self, base: Any) -> None:
        bias = base.bias
        self._before = None if bias is None else bias.data.clone()
        if bias is None:
            base.bias = nn.Parameter(self.delta.detach().clone(), requires_grad=False)
        else:
            bias.data += self.delta.data.to(bias.dtype)

    def unmerge_from(self, base: Any) -> None:
        if self._before is None:
            base.bias = None
        else:
            base.bias.data.copy_(self._before)


class BitFitModel(Tuner):
    """The tuner of `BitFitConfig`."""

    prefix = "bitfit_"

    def targets(self, config: BitFitConfig) -> list[str]:
        check_names("bitfit", "target_modules", config.target_modules, self.model)
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        modules = base_modules(self.model)
        able = {name for name, module in modules.items() if _takes_bias(module)}
        if config.target_modules is None:
            return sorted(name for name in able if modules[name] is not head and not named(name, [*HEADS]))
        for name in modules:
            if named(name, config.target_modules) and name not in able:
                raise UserError("bitfit.target_modules", f"{name} has no bias", fix="leave it out")
        return config.target_modules

    def component(self, config: BitFitConfig, adapter: str, name: str, module: nn.Module) -> BiasDelta:
        bias = module._parameters.get("bias")
        if bias is None:
            return BiasDelta(features(module, text_config(self.model).hidden_size)[1])
        return BiasDelta((bias.ds_shape if hasattr(bias, "ds_shape") else bias.shape)[0])

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """After a merge the config asks for the biases that the merge made, where the architecture knows them."""
        before = {name for name, module in base_modules(self.model).items() if module._parameters.get("bias") is None}
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        made = {name for name, m in base_modules(model).items() if m._parameters.get("bias") is not None} & before
        for flag, part in (("attention_bias", "attn"), ("mlp_bias", "mlp")):
            if hasattr(model.config, flag) and any(part in name for name in made):
                setattr(model.config, flag, True)
        return model


def unwritable_biases(model: Any) -> list[str]:
    """Names of biases that a merge made and that no config of this architecture brings back: loading would drop them.

    Llama's config can ask for biases in attention and MLP; Qwen2's, for one, cannot.
    """
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    known = {name for name, _ in twin.named_parameters()}
    return sorted(name for name, _ in model.named_parameters() if name.endswith(".bias") and name not in known)


def _takes_bias(module: nn.Module) -> bool:
    """Whether adding to the module's output is adding to a bias that it has or, being linear, could have."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        return False
    return module._parameters.get("bias") is not None or isinstance(module, nn.Linear | Conv1D)


register("bitfit", BitFitConfig, BitFitModel)
