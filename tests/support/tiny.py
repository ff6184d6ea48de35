"""Tiny models with real shapes, and a small recipe on the quickstart's data, for tests that run whole stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "pipeline" / "recipes" / "quickstart"
ROWS = 600
"""As many of each file as a few steps want; to encode all of them took a third of the time of a chain."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "llama_small": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}


WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 256},
    "qwen2": {"hidden_size": 128, "intermediate_size": 256},
    "opt": {"hidden_size": 128, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 128},
}
"""Changes to SHAPES for 4-bit weights: bitsandbytes packs blocks of 64, and its CPU kernels want whole ones in every row."""


def build(shape: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    """A random model of 97 tokens (pad 0, EOS 1) whose next-token distribution is far from flat."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SHAPES[shape], "vocab_size": 97, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return built.eval()


def model(folder: Path, shape: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random model of `shape` with the quickstart's tokenizer, saved in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    values = {**SHAPES[shape], **changes}
    config = AutoConfig.for_model(
        values.pop("model_type"),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        **values,
    )
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # HF initialises so small that every logit is near zero; make rows tell apart
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(path: Path, base: Path, rows: int | None = ROWS, **changes: Any) -> Path:
    """A three-stage recipe of a few steps on the quickstart's data; `changes` are laid over it (dotted keys with __).
    `rows`: how many of each file, all where it is None."""
    value: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(base), "dtype": "fp32"},
        "adapter": {"method": "lora", "r": 4, "alpha": 8},
        "deepspeed": {"config": "zero2", "num_gpus": 2},
        "data": {"holdout": 0.05},
        "stages": {
            "sft": {
                "kind": "sft",
                "data": [{"path": str(QUICKSTART / "demonstrations.jsonl"), "limit": rows}],
                "steps": 4,
                "batch": 8,
                "micro_batch": 2,
                "lr": 1e-2,
                "save_every": 2,
                "log_every": 1,
                "eval_rows": 16,
            },
            "reward": {
                "kind": "reward",
                "data": [{"path": str(QUICKSTART / "preferences.jsonl"), "limit": rows}],
                "steps": 4,
                "batch": 8,
                "micro_batch": 2,
                "lr": 1e-2,
                "save_every": 2,
                "log_every": 1,
                "eval_rows": 16,
            },
            "ppo": {
                "kind": "ppo",
                "policy": "sft",
                "reward": "reward",
                "prompts": [{"path": str(QUICKSTART / "prompts.jsonl"), "limit": rows}],
                "steps": 4,
                "rollout_batch": 8,
                "minibatches": 2,
                "micro_batch": 2,
                "epochs": 1,
                "lr": 1e-2,
                "save_every": 2,
                "eval_rows": 8,
                "sampling": {"max_prompt_length": 32, "max_response_length": 12},
            },
        },
    }
    for key, change in changes.items():
        node, (*parts, last) = value, key.split("__")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = change
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path
