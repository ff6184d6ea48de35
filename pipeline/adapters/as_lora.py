"""Write a published adapter as the plain LoRA that equals it, for programs that know LoRA alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.build import WEIGHTS, read
from pipeline.errors import UserError
from pipeline.handoff import ADAPTER_CONFIG, MANIFEST, Baton, model_folder

Weights = dict[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""(A float32 [r, in], B float32 [out, r]) of each layer, by its path; the change of its weight is B A."""


def convert(baton: Baton, target: Path) -> None:
    """Write adapter `baton` to the folder `target` as a LoRA of scale 1 whose products are the same: exact but for rounding.

    Raises UserError for an adapter that changes weights by more than a product of two factors, or not weights at all.
    """
    config = json.loads((baton.path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    weights, head = read(baton.path)
    if config["peft_type"] == "LORA" and not config.get("use_dora"):
        shutil.copytree(baton.path, target, ignore=shutil.ignore_patterns(MANIFEST))
        return
    if config["peft_type"] not in ("ADALORA", "VERA"):
        raise UserError(
            str(baton.path),
            f"{baton.adapter.method} has no exact LoRA equivalent",
            expected="one of: " + ", ".join(EXACT),
            fix="keep the adapter as it is; its README says how to open it",
        )
    vera = config["peft_type"] == "VERA"
    factors = _of_vera(weights, baton) if vera else _of_adalora(weights, config)
    shutil.copytree(baton.path, target, ignore=shutil.ignore_patterns(MANIFEST, WEIGHTS, ADAPTER_CONFIG, "README.md"))
    _write(factors, head, config, target)


EXACT = ("lora", "qlora", "rslora", "pissa", "adalora", "vera")
"""Methods whose adapters are LoRA, or equal one."""


def _of_adalora(weights: Weights, config: dict[str, Any]) -> Factors:
    """B (E A) alpha / init_r; what PEFT adds to init_r is in the number too."""
    scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
    found = {}
    for layer in _layers(weights, ".lora_A"):
        down = weights[f"{layer}.lora_A"].float() * weights[f"{layer}.lora_E"].float() * scale
        found[layer] = (down, weights[f"{layer}.lora_B"].float())
    return found


def _of_vera(weights: Weights, baton: Baton) -> Factors:
    """diag(b) B diag(d) A, every layer with its own part of the shared factors."""
    shared_down, shared_up = weights["base_model.vera_A"].float(), weights["base_model.vera_B"].float()
    layers = _layers(weights, ".vera_lambda_b")
    inputs, found = _inputs(baton, layers), {}
    for layer in layers:
        up, down = weights[f"{layer}.vera_lambda_b"].float(), weights[f"{layer}.vera_lambda_d"].float()
        found[layer] = (down.unsqueeze(1) * shared_down[:, : inputs[layer]], up.unsqueeze(1) * shared_up[: len(up)])
    return found


def _inputs(baton: Baton, layers: list[str]) -> dict[str, int]:
    """Columns of each layer's weight, from the base's config: the model is made without memory."""
    record = baton.manifest["base"]
    folder = model_folder(record["model"], record["revision"])
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # nosec B615 # a folder
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {}
    for layer in layers:
        weight = model.get_submodule(layer.removeprefix("base_model.model."))
        found[layer] = weight.nx if isinstance(weight, Conv1D) else weight.in_features
    return found


def _layers(weights: Weights, ending: str) -> list[str]:
    return sorted(name.removesuffix(ending) for name in weights if name.endswith(ending))


def _write(factors: Factors, head: Weights, config: dict[str, Any], target: Path) -> None:
    """A LoRA whose alpha is its rank, layer by layer; a layer that was pruned away keeps one row of zeros."""
    state: Weights = {f"base_model.model.score.{name}": value for name, value in head.items()}
    ranks = {}
    for layer, (down, up) in factors.items():
        if not len(down):
            down, up = down.new_zeros(1, down.shape[1]), up.new_zeros(len(up), 1)
        state |= {f"{layer}.lora_A.weight": down.contiguous(), f"{layer}.lora_B.weight": up.contiguous()}
        ranks[layer.removeprefix("base_model.model.")] = len(down)
    save_file(dict(sorted(state.items())), target / WEIGHTS, {"format": "pt"})
    most = max(ranks.values())
    others = {layer: rank for layer, rank in ranks.items() if rank != most}
    plain = {
        "peft_type": "LORA",
        "task_type": config["task_type"],
        "base_model_name_or_path": config["base_model_name_or_path"],
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": config["target_modules"],
        "modules_to_save": config["modules_to_save"],
        "fan_in_fan_out": config.get("fan_in_fan_out", False),
        "bias": "none",
    }
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (target / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
