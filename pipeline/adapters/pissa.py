"""PiSSA (Meng et al. 2024, arXiv 2404.02948) trains principal components taken out of the base's weights; what is published
is the exact LoRA of twice the rank on the base as it was: W - B0 A0 + B A = W + [B, -B0] [A; A0].
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

START = "_pissa_start"


def remember(model: Any, adapter: str) -> None:
    """Keep what the factors of `adapter` start as; PEFT has just taken their product out of the weights."""
    started: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name.split("."):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                started[name.replace(f".{adapter}", "")] = parameter.detach().to("cpu", copy=True)
    setattr(model, START, started)


def as_lora(
    model: Any, weights: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, config) of an adapter as a plain LoRA; unchanged for one that is no PiSSA."""
    started: dict[str, torch.Tensor] | None = getattr(model, START, None)
    if started is None:
        return weights, config
    joined = dict(weights)
    for name, value in weights.items():
        first = started.get(name)
        if first is not None and "lora_A" in name:
            joined[name] = torch.cat([value, first.to(value)])
        elif first is not None:
            joined[name] = torch.cat([value, -first.to(value)], dim=1)
    doubled: dict[str, Any] = {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    for key in ("rank_pattern", "alpha_pattern"):
        doubled[key] = {layer: 2 * value for layer, value in config[key].items()}
    return joined, config | doubled
