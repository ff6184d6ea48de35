"""AdaLoRA as PEFT's documentation trains it: one process, its own model, loss and `update_and_allocate`."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

from pipeline.adapters import adalora
from pipeline.config.schema import Adapter
from tests.support import tiny

STEPS = 12
RATE = 0.5
TARGETS = ["down_proj", "q_proj", "v_proj"]
ADAPTER = Adapter(method="adalora", init_r=5, target_r=2, tinit=2, tfinal=3, deltaT=2, alpha=16, orth_reg_weight=0.1)
"""Five singular values: no multiple of two ranks. Steps 4, 6 and 8 prune; the ranks are final after step 9 (from 0)."""


def rows(step: int) -> torch.Tensor:
    """The batch of a step: int64 [8, 10], of the tiny model's 97 tokens."""
    return torch.randint(3, 97, (8, 10), generator=torch.Generator().manual_seed(100 + step))


def model(settings: AdaLoraConfig, name: str = "default", dtype: torch.dtype = torch.float32) -> PeftModel:
    """The same weights in every process."""
    base = tiny.build("llama").to(dtype)
    torch.manual_seed(1)
    return get_peft_model(base, settings, adapter_name=name, autocast_adapter_dtype=False).train()


def settings() -> AdaLoraConfig:
    return adalora.config(ADAPTER, STEPS, TARGETS, "CAUSAL_LM")


def weights(trained: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trained.items() if "lora_" in n}


def trained() -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
    """(the adapter's weights, the rank pattern) after all steps of plain gradient descent."""
    peft = model(settings())
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        peft(input_ids=rows(step), labels=rows(step)).loss.backward()
        optimizer.step()
        peft.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return weights(dict(peft.named_parameters())), peft.peft_config["default"].rank_pattern
