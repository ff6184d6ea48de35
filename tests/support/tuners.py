"""The fine-tuning methods that Relay adds to PEFT, configured for the tiny models, and what tests do with them."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from pipeline.adapters.bitfit import BitFitConfig
from pipeline.adapters.hybrid import HybridConfig
from pipeline.adapters.reft import ReftConfig
from pipeline.adapters.soft_prompt import SoftPromptConfig, virtual_ids
from tests.support.tiny import build

SHAPES = ("llama", "qwen2", "opt", "gpt2")

LLAMA = {"query": "q_proj", "lora": ["q_proj", "v_proj"], "attention": "o_proj", "mlp": "down_proj", "whole": ["mlp"]}
NAMES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "opt": {**LLAMA, "attention": "out_proj", "mlp": "fc2", "whole": ["fc2"], "inputs": ["fc1"]},
    "gpt2": {
        "query": "c_attn",
        "lora": ["c_attn"],
        "attention": "attn.c_proj",
        "mlp": "mlp.c_proj",
        "whole": ["mlp"],
    },
    "gpt_neox": {
        "query": "query_key_value",
        "lora": ["query_key_value"],
        "attention": "attention.dense",
        "mlp": "dense_4h_to_h",
        "whole": ["mlp"],
    },
}
METHODS = (
    "houlsby",
    "pfeiffer",
    "parallel",
    "prefix",
    "p_tuning_v2",
    "mam",
    "unipelt",
    "bitfit",
    "loreft",
    "direft",
    "prompt",
    "p_tuning",
)
IDENTITY = ("houlsby", "pfeiffer", "parallel", "bitfit", "loreft", "direft")
"""What changes nothing before it is trained."""


def config(method: str, shape: str, **changes: Any) -> Any:
    names = NAMES[shape]
    task: dict[str, Any] = {"task_type": "CAUSAL_LM", **changes}
    parallel = {"parallel_modules": names["whole"], "parallel_inputs": names.get("inputs")}
    small = {"bottleneck_dim": 5, **task}
    prefix = {"prefix_modules": [names["query"]], "num_virtual_tokens": 3}
    match method:
        case "houlsby":
            return HybridConfig(sequential_modules=[names["attention"], names["mlp"]], non_linearity="gelu", **small)
        case "pfeiffer":
            return HybridConfig(sequential_modules=[names["mlp"]], **small)
        case "parallel":
            return HybridConfig(**parallel, scaling=2.5, **small)
        case "prefix":
            return HybridConfig(**prefix, encoder_hidden_size=7, **task)
        case "p_tuning_v2":
            return HybridConfig(**prefix, **task)
        case "mam":
            return HybridConfig(**prefix, **parallel, scaling=4.0, **small)
        case "unipelt":
            lora = {"lora_modules": names["lora"], "lora_r": 4}
            return HybridConfig(**prefix, **lora, sequential_modules=[names["mlp"]], gating=True, **small)
        case "bitfit":
            return BitFitConfig(**task)
        case "loreft" | "direft":
            return ReftConfig(kind=method, r=3, **task)
        case "prompt":
            return SoftPromptConfig(num_virtual_tokens=3, **task)
        case "p_tuning":
            return SoftPromptConfig(num_virtual_tokens=3, encoder_hidden_size=6, **task)
    raise ValueError(method)


def adapted(method: str, shape: str, name: str = "policy", *, trained: bool = True, **changes: Any) -> Any:
    """A tiny model with an adapter; `trained` moves its parameters well away from where they start."""
    model = get_peft_model(build(shape), config(method, shape, **changes), adapter_name=name).eval()
    if trained:
        disturb(model, name)
    return model


def disturb(model: Any, name: str, seed: int = 0) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype))


def padded(rows: list[list[int]], side: str, pad: int = 0) -> dict[str, Tensor]:
    """ids, mask and positions of `rows`, padded on `side`."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = [pad] * (width - len(row))
        ids.append(gap + row if side == "left" else row + gap)
        mask.append([0] * len(gap) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(gap))
    seen = torch.tensor(mask)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.tensor(ids), "attention_mask": seen, "position_ids": positions}


def logits(model: Any, rows: list[list[int]], side: str = "right", name: str | None = None) -> list[Tensor]:
    """Logits of each row's own tokens, through the model inside, as Relay's roles call it: virtual tokens put in front."""
    prompt = virtual_ids(model, name)
    batch = padded([prompt + row for row in rows], side)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        out = inner(**batch).logits
    return [out[place][batch["attention_mask"][place] == 1][len(prompt) :] for place in range(len(rows))]


def watched(module: torch.nn.Module, run: Any) -> tuple[Any, Any]:
    """(input, output) of `module` during `run()`, in float64 NumPy."""
    seen: list[Any] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    assert len(seen) == 1
    return tuple(value.detach().double().numpy() for value in seen[0])  # type: ignore[return-value]


def weights(module: torch.nn.Module) -> dict[str, Any]:
    """A module's parameters by name, in float64 NumPy."""
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
