"""What Relay's own fine-tuning methods share: a layer around a module of the base, and the tuner through which PEFT knows it.

PEFT adds what a method trains by putting a layer in place of a module. A `TunerLayer` holds the module it replaced as
`base_layer` and one `Component` for each adapter, under `ext.<adapter>`: parameters are named `...ext.<adapter>....`, and
PEFT's own functions build, switch, save and load them. Which component goes where is the method's tuner's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, PeftType, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError


def register(name: str, config: type, tuner: type) -> None:
    """Make method `name` (lower case) known to PEFT, so that `get_peft_model` builds it and `from_pretrained` opens it.

    PEFT asks that a method be a member of its closed enum `PeftType` and offers no way to add one (peft#2273).
    """
    member = name.upper()
    if member not in PeftType.__members__:
        added = str.__new__(PeftType, member)
        added._name_, added._value_, added._sort_order_ = member, member, len(PeftType.__members__)
        PeftType._member_names_.append(member)
        PeftType._member_map_[member] = PeftType._value2member_map_[member] = added
        type.__setattr__(PeftType, member, added)
    register_peft_method(name=name, config_cls=config, model_cls=tuner)


@dataclass
class MethodConfig(PeftConfig):
    """What the configs of Relay's own methods share. Lists are written sorted, so that equal work gives equal files.

    `modules_to_save` names modules that train and are saved whole, such as `score`.
    """

    target_modules: list[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules must be a list of module names, got the string {self.target_modules!r}")

    def to_dict(self) -> dict[str, Any]:
        return {
            key: sorted(value) if isinstance(value, set | frozenset) else value
            for key, value in super().to_dict().items()
        }


class Component(nn.Module):
    """What one adapter adds at one module: given the module's input and output, the changed output.

    It is always called, never read from outside: ZeRO-3 gathers the parameters of modules that are called.
    """

    mergeable = False

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        raise NotImplementedError

    def merge_into(self, base: nn.Module) -> None:
        """Change the base's weights so that they do what this component does."""
        raise ValueError(f"{type(self).__name__} is not linear in its input and cannot be merged into base weights")

    def unmerge_from(self, base: nn.Module) -> None:
        raise NotImplementedError


class TunerLayer(nn.Module, BaseTunerLayer):
    """A module of the base and what the adapters add to it.

    Which adapters act is read from `_active_adapter` and `_disable_adapters` at each call.
    """

    adapter_layer_names = ("ext",)

    def __init__(self, base_layer: nn.Module, adapter: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ext = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = [adapter]

    def __getattr__(self, name: str) -> Any:
        """Models ask their modules for more than a call (`attention_type` of a block, `in_features` of a projection).

        What is private or DeepSpeed's belongs to one module and is not passed on.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith(("_", "ds_")):
                raise
            return getattr(self.base_layer, name)

    def add(self, adapter: str, component: Component, *, trained: bool) -> None:
        self.ext[adapter] = component
        component.requires_grad_(trained)

    def active(self) -> list[Any]:
        """The components that act on the next call, in the order of the active adapters."""
        if self.disable_adapters or self.merged:
            return []
        return [self.ext[name] for name in self.active_adapters if name in self.ext]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        components = self.active()
        if not components:
            return output
        given = args[0] if args else kwargs["hidden_states"]
        changed = output[0] if isinstance(output, tuple) else output
        for component in components:
            changed = component(given, changed)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.ext:
                continue
            component: Any = self.ext[name]
            if safe_merge and not all(torch.isfinite(p).all() for p in component.parameters()):
                raise ValueError(f"NaNs or infinities in adapter {name}: it cannot be merged safely")
            component.merge_into(self.get_base_layer())
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            component: Any = self.ext[self.merged_adapters.pop()]
            component.unmerge_from(self.get_base_layer())


class Tuner(BaseTuner):
    """A method: says which modules it changes (`targets`) and by which components (`component`)."""

    tuner_layer_cls = TunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads it from the class

    def targets(self, config: Any) -> list[str]:
        """Names or name endings of the modules to change; raises UserError where a name fits none."""
        raise NotImplementedError

    def component(self, config: Any, adapter: str, name: str, module: nn.Module) -> Component:
        """A fresh component for the base's module `name`."""
        raise NotImplementedError

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        given = config.target_modules
        config.target_modules = self.targets(config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.target_modules = given  # PEFT leaves a set of shortened names, in an order that changes

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = target
        if not isinstance(target, TunerLayer):
            layer = self.tuner_layer_cls(target, adapter_name)
            setattr(parent, target_name, layer)
        base = layer.get_base_layer()
        component = self.component(peft_config, adapter_name, current_key, base)
        if not any(p.is_meta for p in component.parameters()):
            like = anchor(base, self.model)
            component.to(device=like.device, dtype=like.dtype)
        trained = adapter_name in self.active_adapters and not peft_config.inference_mode
        layer.add(adapter_name, component, trained=trained)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own copies a weight, which a whole block does not have

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in tuner_layers(self.model):
            for component in layer.active():
                if not component.mergeable:
                    names = ", ".join(self.active_adapters)
                    raise ValueError(
                        f"adapter {names}: {type(self).__name__} cannot be merged into the base's weights; load it with "
                        "PeftModel.from_pretrained instead"
                    )

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError(
                f"{type(self).__name__} has one adapter for a whole batch and cannot follow adapter_names; run the rows of "
                "each adapter on their own, after set_adapter"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".ext.{adapter_name}.", ".ext.")


def tuner_layers(model: nn.Module) -> list[TunerLayer]:
    return [module for module in model.modules() if isinstance(module, TunerLayer)]


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules, by the names they have without adapters. Modules that an adapter saves whole are left out."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = (*inside, f"{name}.")
        if not isinstance(module, AuxiliaryTrainingWrapper):
            found[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return found


def named(name: str, wanted: list[str] | None) -> bool:
    """Whether a module's name is one of `wanted` or ends in one, at a dot: PEFT's rule."""
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted or [])


def check_names(method: str, option: str, wanted: list[str] | None, model: nn.Module) -> None:
    """Raise UserError unless each name in `wanted` fits a module of the base."""
    modules = base_modules(model)
    for ending in wanted or []:
        if not any(named(name, [ending]) for name in modules):
            last = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
            raise UserError(
                f"{method}.{option}",
                f"{type(model).__name__} has no module {ending}",
                expected="names or name endings of its modules, such as " + ", ".join(last),
            )


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def features(module: nn.Module, hidden: int) -> tuple[int, int]:
    """(width of a module's input, of its output). Of what is no linear layer, the input and output are hidden states."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    found_in: Any = getattr(module, "in_features", hidden)
    found_out: Any = getattr(module, "out_features", hidden)
    return found_in, found_out


def anchor(module: nn.Module, model: Any) -> Tensor:
    """A weight that says in which dtype and on which device a component beside `module` belongs.

    That is the module's own, unless it is packed (4-bit weights, uint8 or whatever they are stored as) or has none: then
    the input embedding's dtype, which is the one the model computes in.
    """
    own = getattr(module, "weight", None)
    embedding = model.get_input_embeddings().weight
    if not isinstance(own, Tensor):
        own = next(module.parameters(), embedding)
        return torch.empty(0, dtype=embedding.dtype, device=own.device)
    packed = not own.is_floating_point() or hasattr(own, "quant_state")
    return torch.empty(0, dtype=embedding.dtype if packed else own.dtype, device=own.device)
