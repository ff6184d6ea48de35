"""Relay's side of a benchmark on a 4-bit base whose random weights are made on the device, layer by layer, not read.

python made_side.py RECIPE RUN_DIR        # the recipe's base is a folder with config.json and a tokenizer
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from relay_side import run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.schema import Base
from pipeline.model import load


def made(kind: Any, base: Base, sharded: bool, **extra: Any) -> Any:
    """What `load._load` gives for a base of such a config: nf4 linear layers, the rest in bf16, dropout off."""
    assert kind is AutoModelForCausalLM, "every role of this benchmark stands on one language model"
    assert base.quantization == "nf4"
    assert not sharded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load._without_dropout(AutoConfig.from_pretrained(base.model), extra)
    config._attn_implementation = base.attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, packed(module, device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                module._parameters[name] = nn.Parameter(
                    nn.init.normal_(value, std=0.02) + ("norm" in type(module).__name__.lower())
                )
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    model.is_loaded_in_4bit = model.is_quantized = True
    model.eval()
    load._keep_gradients(model)
    return model


def packed(layer: nn.Linear, device: torch.device) -> nn.Module:
    weight = torch.randn(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=device) * 0.02
    four = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    four.weight = bitsandbytes.nn.Params4bit(
        weight.cpu() if device.type == "cpu" else weight,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    ).to(device)
    return four


if __name__ == "__main__":
    load._load = made
    run()
