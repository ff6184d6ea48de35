"""The components that hybrid methods are put together from, but for prefixes: bottlenecks, low-rank updates, gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.tuner import Component


class Wire:
    """Carries one value from the module that has it to the one that needs it, within a forward pass."""

    def __init__(self) -> None:
        self._value: Any = None

    def put(self, value: Any) -> None:
        self._value = value

    def take(self) -> Any:
        if self._value is None:
            raise RuntimeError(
                "a component ran before the one that feeds it: the model calls its modules in another order"
            )
        value, self._value = self._value, None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Wire:
        return Wire()


class Gate(nn.Module):
    """How much a component acts on each token, in (0, 1): sigmoid of a linear function of its hidden state, [..., 1].

    UniPELT (2110.07577) averages its gates over the sequence. In a causal model a token would then see those after it,
    and a token sampled would not have the probability it was sampled with. Here each token has its own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, *, log: bool = False) -> Tensor:
        logit = self.linear(hidden.to(self.linear.weight.dtype))
        return functional.logsigmoid(logit) if log else torch.sigmoid(logit)


class Bottleneck(Component):
    """y + g * s * (U f(D h + b) + c) with h the output y of the module (sequential) or its input x (parallel).

    D: [dim, width of h], U: [width of y, dim]; f the non-linearity, s `scaling`, g a
    gate or 1. Houlsby et al. (1902.00751), Pfeiffer et al. (2005.00247), He et al. (2110.04366) for parallel ones.
    `init` zero makes U zero: the component starts as the identity. `houlsby` draws both from a normal distribution of
    standard deviation 0.01 cut at two of them: nearly the identity, as in the paper.
    """

    def __init__(
        self,
        width: int,
        out: int,
        dim: int,
        non_linearity: str,
        scaling: float,
        dropout: float,
        init: str,
        *,
        gated: bool,
        parallel: bool = False,
        source: Wire | None = None,
    ) -> None:
        super().__init__()
        self.parallel, self.source = parallel, source
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, out)
        self.activation, self.dropout = ACT2FN[non_linearity], nn.Dropout(dropout)
        self.scale = scaling
        self.gate = Gate(width) if gated else None
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            if init == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=1e-2, a=-2e-2, b=2e-2)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        if self.source is not None:
            given = self.source.take()
        hidden = (given if self.parallel else output).to(self.down.weight.dtype)
        change = self.dropout(self.up(self.activation(self.down(hidden))) * self.scale)
        if self.gate is not None:
            change = change * self.gate(hidden)
        return output + change.to(output.dtype)


class Tap(Component):
    """Hands its module's input to a parallel bottleneck at a later module: for blocks whose MLP is no module of its own."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        self.wire.put(given)
        return output


class LowRank(Component):
    """y + g * (alpha / r) * B A x: LoRA (2106.09685), with a gate g or 1. A: [r, width], B: [out, r], B starts as zero."""

    def __init__(self, width: int, out: int, r: int, alpha: float, dropout: float, *, gated: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, r, bias=False), nn.Linear(r, out, bias=False)
        self.scale, self.dropout = alpha / r, nn.Dropout(dropout)
        self.gate = Gate(width) if gated else None
        self.mergeable = not gated
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        hidden = given.to(self.down.weight.dtype)
        change = self.up(self.down(self.dropout(hidden))) * self.scale
        if self.gate is not None:
            change = change * self.gate(hidden)
        return output + change.to(output.dtype)

    def merge_into(self, base: nn.Module) -> None:
        self._add(base, 1.0)

    def unmerge_from(self, base: nn.Module) -> None:
        self._add(base, -1.0)

    def _add(self, base: Any, sign: float) -> None:
        if not base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
            raise ValueError("packed weights cannot take a merge: dequantise the base first (model.dequantize())")
        change = (self.up.weight.data.float() @ self.down.weight.data.float()) * (self.scale * sign)
        base.weight.data += (change.T if isinstance(base, Conv1D) else change).to(base.weight.dtype)
