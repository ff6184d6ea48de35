"""Attach, load and save adapters. The files are PEFT's own, so that plain `PeftModel.from_pretrained` opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from pipeline.adapters import adalora
from pipeline.config.schema import Adapter
from pipeline.errors import UserError

HEADS = ("lm_head", "score", "embed_out")
WEIGHTS = "adapter_model.safetensors"
UNTRAINED = ("ranknum",)
"""Parameters of adapters that only count."""


def targets(model: Any, wanted: str | list[str]) -> list[str]:
    """Names of the linear layers to adapt, sorted; `all-linear` is all of them but the output heads."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in adapted)
    plain = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not name.startswith(inside)
    }
    linear = {name.rpartition(".")[2] for name in plain | adapted.keys()} - set(HEADS)
    if wanted == "all-linear":
        return sorted(linear)
    unknown = sorted(set(wanted) - linear)
    if unknown:
        raise UserError(
            "adapter.targets",
            f"this model has no linear layer {', '.join(unknown)}",
            expected="some of: " + ", ".join(sorted(linear)),
        )
    return sorted(wanted)


def config(adapter: Adapter, model: Any, task: str, steps: int | None = None) -> PeftConfig:
    """A fresh adapter for `model`; `task` is CAUSAL_LM or SEQ_CLS, and the latter keeps the score head with the adapter.
    `steps` are the optimizer steps it will train for, which AdaLoRA's schedule needs."""
    if adapter.method == "adalora":
        return adalora.config(adapter, steps or 0, targets(model, adapter.targets), task)
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        task_type=task,
        target_modules=targets(model, adapter.targets),
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def attach(model: Any, adapter: Adapter, task: str, name: str = "default", steps: int | None = None) -> Any:
    """`model` with a fresh adapter `name`, in the base's dtype: DeepSpeed holds float32 master weights of what trains."""
    return get_peft_model(model, config(adapter, model, task, steps), adapter_name=name, autocast_adapter_dtype=False)


def add(model: Any, config: PeftConfig, name: str) -> Any:
    """`model`, plain or with adapters already, with one more fresh adapter."""
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model


def same_method(adapter: Adapter, folder: Path) -> bool:
    """Whether the adapter in `folder` has the method and shape the recipe asks for, so that training can continue it."""
    found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    wanted = found["target_modules"] if adapter.targets == "all-linear" else sorted(adapter.targets)
    return bool(
        adapter.method == "lora"
        and found["peft_type"] == "LORA"
        and found["r"] == adapter.r
        and found["lora_alpha"] == adapter.alpha
        and not found.get("use_dora")
        and not found.get("use_rslora")
        and sorted(found["target_modules"]) == wanted
    )


def belongs(parameter: str, adapter: str) -> bool:
    """Whether a parameter of a PEFT model, by its full name, is one of `adapter`."""
    return adapter in parameter.split(".")


def trained(model: Any, adapter: str) -> list[torch.nn.Parameter]:
    """The parameters that training `adapter` changes."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if belongs(name, adapter) and not any(part in UNTRAINED for part in name.split("."))
    ]


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(adapter weights, head weights) of a published adapter; the head is `score.weight` when there is one."""
    weights = load_file(folder / WEIGHTS)
    head = {name.rpartition("score.")[2]: value for name, value in weights.items() if ".score." in name}
    return {name: value for name, value in weights.items() if ".score." not in name}, head


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    """The score head of a published full classifier, from whichever shard holds it."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found = {
                name.removeprefix("score."): weights.get_tensor(name)
                for name in weights.keys()  # noqa: SIM118
                if name.startswith("score.")
            }
        if found:
            return found
    raise UserError(str(folder), "no score head in its weights", expected="a reward model with `score.weight`")


def put(model: PeftModel, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into adapter `name` of `model`; a head it trains stays. Raises UserError when they do not fit it."""
    heads = {  # PEFT fails on a state without the modules it saves whole
        f"{path}.{saved}": module.get_parameter(loaded).detach()
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for saved, loaded in module.adapter_state_dict_load_map(name).items()
    }
    result = set_peft_model_state_dict(model, {**heads, **weights}, adapter_name=name)
    missing = [k for k in result.missing_keys if belongs(k, name) and "lora_" in k]
    if result.unexpected_keys or missing:
        raise UserError(
            f"adapter {name}",
            f"its weights do not fit the base: {(result.unexpected_keys or missing)[0]}",
            expected="an adapter trained on this base",
        )


def put_head(model: PeftModel, name: str, head: dict[str, torch.Tensor]) -> None:
    """Copy a published score head into the one that adapter `name` trains."""
    trained = model.get_base_model().score.modules_to_save[name]
    with torch.no_grad():
        for key, value in head.items():
            trained.get_parameter(key).copy_(value)


def write(model: PeftModel, name: str, state: dict[str, torch.Tensor], folder: Path, base: str) -> None:
    """Write gathered adapter weights and their config, with lists sorted so that the same work gives the same bytes."""
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    save_file({key: value.contiguous() for key, value in sorted(weights.items())}, folder / WEIGHTS, {"format": "pt"})
    config = model.peft_config[name].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": base}
    plain = json.loads(json.dumps(config, default=_jsonable))
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
