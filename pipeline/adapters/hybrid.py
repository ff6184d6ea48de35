"""Bottleneck adapters, prefixes, low-rank updates and gates in any combination, as one PEFT method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.utils import PeftType
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pipeline.adapters import prefix
from pipeline.adapters.bottleneck import Bottleneck, LowRank, Tap, Wire
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

OPTIONS = ("sequential_modules", "parallel_modules", "parallel_inputs", "lora_modules", "prefix_modules")


@dataclass
class HybridConfig(MethodConfig):
    """A combination of the components below, each at modules of its own; at least one list must name some.

    Names are matched as PEFT does: a module whose name is one of them or ends in one, at a dot. A name that fits no module is
    an error. A module inside another one that is named cannot be named too.

    | Paper | here |
    |---|---|
    | Houlsby et al. 1902.00751 | `sequential_modules` the last linear layers of attention and MLP, `init: houlsby` |
    | Pfeiffer et al. 2005.00247 | `sequential_modules` the last linear layer of the MLP |
    | parallel adapter, He et al. 2110.04366 | `parallel_modules` the MLP; OPT has none: `[fc2]` with `parallel_inputs: [fc1]` |
    | prefix tuning, Li & Liang 2101.00190 | `prefix_modules` the query projection, `encoder_hidden_size` > 0 |
    | P-tuning v2, Liu et al. 2110.07602 | `prefix_modules`, `encoder_hidden_size: 0` |
    | MAM, He et al. 2110.04366 | `prefix_modules` and `parallel_modules`, `scaling: 4.0` |
    | UniPELT, Mao et al. 2110.07577 | `lora_modules`, `prefix_modules`, `sequential_modules`, `gating: true` |

    Options: `bottleneck_dim` b, `non_linearity` (a name of transformers' activations), `scaling` (a factor of what
    bottlenecks add), `dropout` of bottleneck outputs and LoRA inputs, `init` of bottlenecks (`zero`: starts as the identity;
    `houlsby`: nearly, see `Bottleneck`), `lora_r` r, `lora_alpha`, `num_virtual_tokens` n, `encoder_hidden_size` e, `gating`
    (a gate on each component, of each token's own; UniPELT averages its gates over the sequence, by which a token would see
    those after it).

    What trains, for each module of input width i and output width o (hidden states: H; K key-value heads of width S):
      bottleneck  b (i' + o) + b + o, i' = o if sequential, i if parallel (H with `parallel_inputs`)
      LoRA        r (i + o)
      prefix      2 n K S, or with an encoder n H + H e + e + 2 e K S + 2 K S
      gate        width of what the component reads + 1: i' for bottlenecks, i for LoRA, H for prefixes
    """

    sequential_modules: list[str] | None = field(default=None)
    parallel_modules: list[str] | None = field(default=None)
    parallel_inputs: list[str] | None = field(default=None)
    lora_modules: list[str] | None = field(default=None)
    prefix_modules: list[str] | None = field(default=None)
    bottleneck_dim: int = 64
    non_linearity: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    init: str = "zero"
    lora_r: int = 8
    lora_alpha: float = 16
    num_virtual_tokens: int = 10
    encoder_hidden_size: int = 0
    gating: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("HYBRID")
        for option in OPTIONS:
            if isinstance(getattr(self, option), str):
                raise ValueError(f"{option} must be a list of module names, got the string {getattr(self, option)!r}")
        self.target_modules = sorted({name for option in OPTIONS for name in getattr(self, option) or []})
        if not self.target_modules:
            raise ValueError("a hybrid adapter needs modules: set one of " + ", ".join(OPTIONS))
        self._sort()
        if self.init not in ("zero", "houlsby"):
            raise ValueError(f"init must be 'zero' or 'houlsby', got {self.init!r}")
        if self.non_linearity not in ACT2FN:
            raise ValueError(f"non_linearity {self.non_linearity!r} is none of transformers' activations")
        for option in ("bottleneck_dim", "lora_r", "num_virtual_tokens"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")

    def _sort(self) -> None:
        """Order the lists by name; of `parallel_modules` and `parallel_inputs`, the pairs."""
        for option in ("sequential_modules", "lora_modules", "prefix_modules"):
            if getattr(self, option) is not None:
                setattr(self, option, sorted(getattr(self, option)))
        if not self.parallel_inputs:
            self.parallel_modules = sorted(self.parallel_modules) if self.parallel_modules else self.parallel_modules
            return
        sinks = self.parallel_modules or []
        if len(sinks) != len(self.parallel_inputs):
            raise ValueError("parallel_inputs names the module whose input each of parallel_modules reads: one for one")
        pairs = sorted(zip(sinks, self.parallel_inputs, strict=True))
        self.parallel_modules, self.parallel_inputs = [sink for sink, _ in pairs], [source for _, source in pairs]


class Hybrid(Component):
    """The components of one adapter at one module. They act in the order given; parallel ones read the module's own input."""

    def __init__(self, parts: dict[str, Component]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.mergeable = all(part.mergeable for part in parts.values())

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        for part in self.children():
            output = part(given, output)
        return output

    def merge_into(self, base: nn.Module) -> None:
        for part in self._parts():
            part.merge_into(base)

    def unmerge_from(self, base: nn.Module) -> None:
        for part in self._parts():
            part.unmerge_from(base)

    def _parts(self) -> list[Any]:
        return list(self.children())


class HybridModel(Tuner):
    """The tuner of `HybridConfig`."""

    prefix = "hybrid_"

    def targets(self, config: HybridConfig) -> list[str]:
        for option in OPTIONS:
            check_names("hybrid", option, getattr(config, option), self.model)
        wanted = list(config.target_modules or [])
        chosen = [name for name in base_modules(self.model) if named(name, wanted)]
        for inner in chosen:
            outer = next((name for name in chosen if inner.startswith(f"{name}.")), None)
            if outer is not None:
                raise UserError(
                    "hybrid adapter",
                    f"it names {outer} and {inner}, which is inside",
                    expected="modules that are not inside one another",
                    fix=f"name the last linear layer of {outer} instead, or parallel_inputs for its input",
                )
        self._check_taps(config, chosen)
        return wanted

    def _check_taps(self, config: HybridConfig, chosen: list[str]) -> None:
        for source, sink in zip(config.parallel_inputs or [], config.parallel_modules or [], strict=False):
            for name in chosen:
                if named(name, [sink]) and not any(
                    named(other, [source]) and _block(other) == _block(name) for other in chosen
                ):
                    raise UserError(
                        "hybrid.parallel_inputs",
                        f"the block of {name} has no {source}",
                        expected="a module of the same block, which runs before it",
                    )

    def _prepare_model(self, peft_config: HybridConfig, model: nn.Module) -> None:
        if peft_config.prefix_modules:
            prefix.switch_on(model)

    def component(self, config: HybridConfig, adapter: str, name: str, module: nn.Module) -> Hybrid:
        hidden = text_config(self.model).hidden_size
        width, out = features(module, hidden)
        parts: dict[str, Component] = {}
        if named(name, config.lora_modules):
            parts["lora"] = LowRank(width, out, config.lora_r, config.lora_alpha, config.dropout, gated=config.gating)
        if named(name, config.prefix_modules):
            heads, size = prefix.heads(self.model)
            parts["prefix"] = prefix.Prefix(
                config.num_virtual_tokens, hidden, heads, size, config.encoder_hidden_size, gated=config.gating
            )
        if named(name, config.sequential_modules):
            parts["sequential"] = self._bottleneck(config, out, out)
        for place, source in enumerate(config.parallel_inputs or []):
            if named(name, [source]):
                parts[f"tap{place}"] = Tap(self._wire(adapter, name, place))
        for place, sink in enumerate(config.parallel_modules or []):
            if named(name, [sink]):
                wire = self._wire(adapter, name, place) if config.parallel_inputs else None
                parts["parallel"] = self._bottleneck(config, hidden if wire else width, out, parallel=True, source=wire)
        return Hybrid(parts)

    def _bottleneck(self, config: HybridConfig, width: int, out: int, **options: Any) -> Bottleneck:
        shape = (width, out, config.bottleneck_dim)
        return Bottleneck(
            *shape,
            config.non_linearity,
            config.scaling,
            config.dropout,
            config.init,
            gated=config.gating,
            **options,
        )

    def _wire(self, adapter: str, name: str, place: int) -> Wire:
        """The wire from a tap to its bottleneck in the same block: both are made with the one that is made first."""
        wires: dict[tuple[str, str, int], Wire] = self.__dict__.setdefault("_wires", {})
        return wires.setdefault((adapter, _block(name), place), Wire())

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.__dict__["_wires"] = {k: v for k, v in self.__dict__.get("_wires", {}).items() if k[0] != adapter_name}

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        prefix.switch_off(model)
        return model


def _block(name: str) -> str:
    """The name of the block that a module is in: up to the last number."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ""


register("hybrid", HybridConfig, HybridModel)
