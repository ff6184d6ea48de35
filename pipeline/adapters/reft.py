"""Representation fine-tuning: edit hidden states between blocks, in a subspace of a few dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional

from pipeline.adapters.tuner import (
    Component,
    MethodConfig,
    Tuner,
    base_modules,
    check_names,
    features,
    register,
    text_config,
    tuner_layers,
)
from pipeline.errors import UserError

KINDS = ("loreft", "direft")


@dataclass
class ReftConfig(MethodConfig):
    """LoReFT and DiReFT, Wu et al. 2404.03592, on the output h of decoder blocks, H wide.

    loreft  h + R^T (W h + b - R h), the rows of R orthonormal
    direft  h + R^T (W h + b), R free

    `r` is the number of rows; `target_modules` names the blocks, all of them if it is None.
    Both start as the identity: W = R and b = 0, or W = 0 and b = 0. Deviation: the paper edits some positions of the prompt
    and tunes which; here every position is edited, prompt and reply, so that no caller must say where a prompt ends.

    `output_hidden_states` of transformers shows what blocks give before the edit; the last hidden state is after all.

    What trains: r (2 H + 1) for each block.
    """

    r: int = 4
    kind: str = "loreft"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("REFT")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")


class Intervention(Component):
    """See `ReftConfig`. rotation (R before it is made orthonormal) and weight W: [r, width], bias b: [r]."""

    def __init__(self, width: int, r: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rotation = nn.Parameter(torch.empty(r, width))
        nn.init.orthogonal_(self.rotation)
        self.weight, self.bias = nn.Parameter(torch.zeros(r, width)), nn.Parameter(torch.zeros(r))
        self.start()

    def start(self) -> None:
        """Make it the identity."""
        if self.kind == "loreft":
            with torch.no_grad():
                self.weight.copy_(self._rows())

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        rows = self._rows()
        weight = self.weight - rows if self.kind == "loreft" else self.weight
        return output + (functional.linear(output.to(rows.dtype), weight, self.bias) @ rows).to(output.dtype)

    def _rows(self) -> Tensor:
        """R. Orthonormal: the QR decomposition with a positive diagonal, which is unique and so moves with `rotation`."""
        if self.kind != "loreft":
            return self.rotation
        q, r = torch.linalg.qr(self.rotation.float().T)
        signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
        return (q * signs).T.to(self.rotation.dtype)


class ReftModel(Tuner):
    """The tuner of `ReftConfig`."""

    prefix = "reft_"

    def targets(self, config: ReftConfig) -> list[str]:
        if config.target_modules is None:
            return blocks(self.model)
        check_names("reft", "target_modules", config.target_modules, self.model)
        return config.target_modules

    def component(self, config: ReftConfig, adapter: str, name: str, module: nn.Module) -> Intervention:
        hidden = text_config(self.model).hidden_size
        return Intervention(features(module, hidden)[1], config.r, config.kind)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for layer in tuner_layers(model):  # in the base's dtype R rounds otherwise than it did in float32
            if adapter_name in layer.ext:
                intervention: Any = layer.ext[adapter_name]
                intervention.start()


def blocks(model: Any) -> list[str]:
    """Names of the decoder's blocks in order: the entries of the outermost list that has one for each layer."""
    layers = text_config(model).num_hidden_layers
    modules = base_modules(model)
    lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise UserError(
            "reft", f"no list of {layers} blocks in {type(model).__name__}", fix="name them in target_modules"
        )
    outermost = min(lists, key=lambda name: name.count("."))
    return [f"{outermost}.{number}" for number in range(layers)]


register("reft", ReftConfig, ReftModel)
