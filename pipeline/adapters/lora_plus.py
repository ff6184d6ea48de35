"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the second factor B of each LoRA learns `ratio` times as fast as the first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipeline.config.schema import Adapter, Supervised

SECOND = "lora_B"


def groups(named: Iterable[tuple[str, nn.Parameter]], ratio: float | None) -> list[tuple[float, list[nn.Parameter]]]:
    """(factor of the learning rate, parameters): all of them, or all but the second factors and then these."""
    every = list(named)
    fast = [p for n, p in every if SECOND in n.split(".")]
    if ratio is None or ratio == 1 or not fast:
        return [(1.0, [p for _, p in every])]
    return [(1.0, [p for n, p in every if SECOND not in n.split(".")]), (ratio, fast)]


def for_trainer(model: nn.Module, adapter: Adapter, block: Supervised) -> dict[str, Any]:
    """Arguments that give TRL's trainers an AdamW with these groups; none when all learn at one rate.

    A ready optimizer would not do: under DeepSpeed the trainer drops it and makes its own.
    """
    parts = groups(((n, p) for n, p in model.named_parameters() if p.requires_grad), adapter.lr_ratio)
    if len(parts) == 1:
        return {}
    made = [{"params": params, "lr": block.lr * factor, "weight_decay": block.weight_decay} for factor, params in parts]
    return {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": made, "lr": block.lr, "betas": block.betas})}
