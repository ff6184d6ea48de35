"""Bytes per rank, from config.json and the recipe alone: before any weight is read and without torch.

Counted: weights, gradients, float32 master weights and Adam moments, sharded as the ZeRO stage shards them (Rajbhandari et
al. 2020, arXiv 1910.02054, section 3), with the roles of PPO sharing bases as they will. Not counted: activations, the KV
cache, communication buffers and the framework itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import BASE, Recipe
from pipeline.config.schema import Base, Ppo
from pipeline.errors import UserError

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
NF4_BYTES = 0.516
"""Half a byte per weight, and about 0.016 for the double-quantised scales (Dettmers et al. 2023, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Shape:
    """A decoder's numbers: parameters in linear layers of its blocks, all the rest, and per-block linear shapes (in, out)."""

    linears: list[tuple[int, int]]
    layers: int
    other: int

    @property
    def parameters(self) -> int:
        return self.layers * sum(i * o for i, o in self.linears) + self.other


@dataclass(frozen=True)
class Need:
    """Parameters held (shared bases once), parameters trained, and GiB per rank."""

    parameters: int
    trained: int
    gib: float


def shape(config: dict[str, Any], where: str) -> Shape:
    """The shape of a config.json of the Llama, Qwen2, Mistral, OPT, GPT-2 or GPT-NeoX family."""
    kind = config.get("model_type")
    vocabulary = config.get("vocab_size", 0)
    if kind in ("llama", "qwen2", "qwen3", "mistral"):
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        kv = (config.get("num_key_value_heads") or heads) * size
        linears = [(hidden, heads * size), (hidden, kv), (hidden, kv), (heads * size, hidden),
                   (hidden, inner), (hidden, inner), (inner, hidden)]
        layers = config["num_hidden_layers"]
        biases = heads * size + 2 * kv if kind == "qwen2" else 0
        other = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2) + layers * (2 * hidden + biases) + hidden
        return Shape(linears, layers, other)
    if kind == "opt":
        hidden, inner, width = config["hidden_size"], config["ffn_dim"], config.get("word_embed_proj_dim", config["hidden_size"])
        layers = config["num_hidden_layers"]
        linears = [(hidden, hidden)] * 4 + [(hidden, inner), (inner, hidden)]
        projections = 2 * width * hidden if width != hidden else 0
        final = 0 if config.get("_remove_final_layer_norm") or not config.get("do_layer_norm_before", True) else 2 * hidden
        other = (vocabulary * width + (config["max_position_embeddings"] + 2) * hidden + projections + final
                 + layers * (4 * hidden + inner + hidden + 4 * hidden))
        return Shape(linears, layers, other)
    if kind == "gpt2":
        hidden = config["n_embd"]
        inner = config.get("n_inner") or 4 * hidden
        linears = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
        layers = config["n_layer"]
        other = (vocabulary + config["n_positions"]) * hidden + layers * (4 * hidden + 3 * hidden + 2 * hidden + inner) + 2 * hidden
        return Shape(linears, layers, other)
    if kind == "gpt_neox":
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        linears = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
        other = 2 * vocabulary * hidden + layers * (4 * hidden + 3 * hidden + 2 * hidden + inner) + 2 * hidden
        return Shape(linears, layers, other)
    raise UserError(where, f"model_type {kind!r}", expected="llama, qwen2, qwen3, mistral, opt, gpt2 or gpt_neox",
                    fix="the stage itself runs with other models; only the estimate does not know them")


def read(model: str, where: str, configs: Path | None) -> dict[str, Any]:
    """config.json of a folder or, for a hub id, of `configs/<org>__<name>/` or the hub's cache."""
    folder = Path(model)
    if configs is not None and not folder.is_dir():
        folder = configs / model.replace("/", "__")
    if not (folder / "config.json").is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(hf_hub_download(model, "config.json")).parent
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise UserError(where, f"no config.json of {model} here or on the hub", expected="a model folder or a hub id",
                            fix="check base.model, or give --configs") from None
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def estimate(recipe: Recipe, stage: str, configs: Path | None = None) -> Need:
    """What a stage needs on each rank."""
    block = recipe.stages[stage]
    zero = block.deepspeed.config
    level = int(zero[4]) if zero[:4] == "zero" and zero[4:5].isdigit() else 0
    ranks = block.deepspeed.ranks
    full = block.adapter.method == "full" and block.kind != "evaluate"
    models = _models(recipe, stage)
    shapes = {model: shape(read(recipe.local(model.model), recipe.where("stages", stage, "base"), configs),
                           recipe.where("stages", stage, "base")) for model in models}
    trained_roles = {model: count for model, count in models.items() if count}
    copies = sum(shapes[m].parameters * max(1, models[m] if full else 1) for m in shapes)
    weights = sum(_bytes(m, shapes[m]) * (max(1, models[m]) if full else 1) for m in shapes)
    if full and block.kind == "ppo":  # the frozen reference and reward are copies of their own
        copies += sum(shapes[m].parameters for m in shapes)
        weights += sum(_bytes(m, shapes[m]) for m in shapes)
    trained = 0
    if block.kind != "evaluate":
        for model, count in trained_roles.items():
            rank = block.adapter.r
            lora = shapes[model].layers * sum(rank * (i + o) for i, o in shapes[model].linears)
            trained += count * (shapes[model].parameters if full else lora)
    size = BYTES[block.base.dtype]
    states = trained * (8.0 if block.base.dtype == "fp32" else 12.0)
    gradients = trained * size
    adapters = 0.0 if full else trained * size
    held = (weights + adapters) / (ranks if level >= 3 else 1)
    total = held + gradients / (ranks if level >= 2 else 1) + states / (ranks if level >= 1 else 1)
    if "offload" in zero:
        total -= states / (ranks if level >= 1 else 1)
    return Need(copies, trained, total / 2**30)


def _bytes(base: Base, shape: Shape) -> float:
    linear = shape.parameters - shape.other
    return (linear * NF4_BYTES if base.quantization else linear * BYTES[base.dtype]) + shape.other * BYTES[base.dtype]


def _models(recipe: Recipe, stage: str) -> dict[Base, int]:
    """Each distinct base a stage loads, and how many trained roles live on it."""
    block = recipe.stages[stage]
    if not isinstance(block, Ppo):
        return {block.base: 1}
    models = {block.base: 1}
    reward = recipe.stages[block.reward].base if block.reward != BASE else block.base
    home = reward if block.critic.init == "reward" else block.base
    models[home] = models.get(home, 0) + 1
    models.setdefault(reward, 0)
    return models
