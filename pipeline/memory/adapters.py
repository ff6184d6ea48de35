"""What an adapter of each method holds and keeps for its backward pass, from a model's numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.schema import Adapter

if TYPE_CHECKING:
    from pipeline.memory.shape import Linear, Shape


@dataclass(frozen=True)
class Tensor:
    """`count` trained tensors of `elements` numbers each."""

    count: int
    elements: int


def trained(adapter: Adapter, shape: Shape) -> int:
    """Parameters that train: the formulas of docs/methods.md."""
    return sum(tensor.count * tensor.elements for tensor in tensors(adapter, shape))


def tensors(adapter: Adapter, shape: Shape) -> list[Tensor]:
    return _TENSORS[adapter.method](adapter, shape)


def frozen(adapter: Adapter, shape: Shape) -> int:
    """Numbers of an adapter that do not train: VeRA's random factors."""
    layers = targeted(adapter, shape)
    if adapter.method != "vera" or not layers:
        return 0
    return adapter.r * (max(layer.inputs for layer in layers) + max(layer.outputs for layer in layers))


def targeted(adapter: Adapter, shape: Shape) -> list[Linear]:
    """The linear layers that `targets` names."""
    return [layer for layer in shape.linears if adapter.targets == "all-linear" or layer.name in adapter.targets]


def kept(adapter: Adapter, shape: Shape) -> int:
    """Elements of one token that all blocks keep for an adapter's backward pass.

    Measured for LoRA; of the other methods what their formulas read, and its products.
    """
    if "targets" in adapter.options:
        # Dropout keeps its mask and each layer's own input.
        read = _read(adapter, shape) * (3 if adapter.dropout else 1)
        return read + sum(layer.count * _rank(adapter, layer) for layer in targeted(adapter, shape))
    width, block = shape.hidden, 0
    if "bottleneck_dim" in adapter.options:
        block += (2 if adapter.method == "adapter_houlsby" else 1) * (width + 2 * adapter.bottleneck_dim)
    block += {
        "ia3": 2 * shape.keys + shape.inner,
        "ln_tuning": 2 * width,
        "loreft": 2 * width + 2 * adapter.r,
        "direft": width + adapter.r,
        "unipelt": 3 * width + 2 * adapter.r,
    }.get(adapter.method, 0)
    return shape.layers * block


def _rank(adapter: Adapter, layer: Linear) -> int:
    """Numbers between the two factors of a target's adapter."""
    if adapter.method == "adalora":
        return adapter.init_r
    if adapter.method == "oft":
        return 0
    for pattern, rank in adapter.rank_pattern.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer.name):
            return rank
    return adapter.r


def _read(adapter: Adapter, shape: Shape) -> int:
    """Elements of one token that adapters read and that no one else keeps, over all blocks.

    Layers side by side (queries, keys and values; gate and up) read one tensor; attention's output and ReLU's are kept
    anyway.
    """
    inputs: dict[tuple[str, int], int] = {}
    for layer in targeted(adapter, shape):
        group = _READS.get(layer.name, layer.name)
        if group == "output" or (group == "last" and shape.feed == "relu"):
            continue
        inputs[group, layer.inputs] = max(inputs.get((group, layer.inputs), 0), layer.count)
    return sum(width * count for (_, width), count in inputs.items())


_READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_attn", "query_key_value"), "first"),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), "output"),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h"), "feed"),
    **dict.fromkeys(("down_proj", "fc2", "dense_4h_to_h"), "last"),
}
"""Which tensor of a block a linear layer reads."""


def _lora(adapter: Adapter, shape: Shape) -> list[Tensor]:
    found = []
    for layer in targeted(adapter, shape):
        rank = _rank(adapter, layer)
        found += [Tensor(layer.count, rank * layer.inputs), Tensor(layer.count, rank * layer.outputs)]
        if adapter.method == "dora":
            found.append(Tensor(layer.count, layer.outputs))
        if adapter.method == "adalora":
            found.append(Tensor(layer.count, rank))
    return found


def _vera(adapter: Adapter, shape: Shape) -> list[Tensor]:
    layers = targeted(adapter, shape)
    return [Tensor(layer.count, size) for layer in layers for size in (adapter.r, layer.outputs)]


def _oft(adapter: Adapter, shape: Shape) -> list[Tensor]:
    size = adapter.oft_block_size
    return [Tensor(layer.count, layer.inputs // size * (size * (size - 1) // 2)) for layer in targeted(adapter, shape)]


def _fused(shape: Shape) -> bool:
    """Whether one layer makes queries, keys and values."""
    return any(layer.name in ("c_attn", "query_key_value", "qkv_proj") for layer in shape.linears)


def _ia3(adapter: Adapter, shape: Shape) -> list[Tensor]:
    attention = [shape.queries + 2 * shape.keys] if _fused(shape) else [shape.keys, shape.keys]
    return [Tensor(shape.layers, size) for size in (*attention, shape.inner)]


def _ln_tuning(adapter: Adapter, shape: Shape) -> list[Tensor]:
    return [Tensor(2 * shape.layers * (1 if shape.rms else 2), shape.hidden)]


def _bitfit(adapter: Adapter, shape: Shape) -> list[Tensor]:
    """A bias on every linear layer; on norms those that have one, the last one's too."""
    norms = [] if shape.rms else [Tensor(2 * shape.layers + shape.final_norm, shape.hidden)]
    return [*[Tensor(layer.count, layer.outputs) for layer in shape.linears], *norms]


def _bottlenecks(adapter: Adapter, shape: Shape, places: int) -> list[Tensor]:
    width, inner = shape.hidden, adapter.bottleneck_dim
    return [Tensor(places * shape.layers, size) for size in (width * inner, inner, inner * width, width)]


def _prefix(adapter: Adapter, shape: Shape) -> list[Tensor]:
    """Each block's own: through a network where the method has an encoder, else keys and values themselves."""
    tokens, both = adapter.num_virtual_tokens, 2 * shape.keys
    if "encoder_hidden_size" not in adapter.options:
        return [Tensor(shape.layers, tokens * both)]
    inner = adapter.encoder_hidden_size
    sizes = (tokens * shape.hidden, shape.hidden * inner, inner, inner * both, both)
    return [Tensor(shape.layers, size) for size in sizes]


def _unipelt(adapter: Adapter, shape: Shape) -> list[Tensor]:
    """Three parts and a gate for each: LoRA has one on each of its layers."""
    outputs = [shape.queries + 2 * shape.keys] if _fused(shape) else [shape.queries, shape.keys]
    lora = [Tensor(shape.layers, adapter.r * size) for out in outputs for size in (shape.hidden, out)]
    gates = [Tensor((len(outputs) + 2) * shape.layers, size) for size in (shape.hidden, 1)]
    return [*lora, *_prefix(adapter, shape), *_bottlenecks(adapter, shape, 1), *gates]


def _reft(adapter: Adapter, shape: Shape) -> list[Tensor]:
    rank, width = adapter.r, shape.hidden
    return [Tensor(2 * shape.layers, rank * width), Tensor(shape.layers, rank)]


def _soft_prompt(adapter: Adapter, shape: Shape) -> list[Tensor]:
    width, vectors = shape.width, Tensor(1, adapter.num_virtual_tokens * shape.width)
    if adapter.method == "prompt_tuning":
        return [vectors]
    inner = adapter.encoder_hidden_size
    return [vectors, *(Tensor(1, n) for n in (width * inner, inner, inner * inner, inner, inner * width, width))]


_TENSORS: dict[str, Callable[[Adapter, Shape], list[Tensor]]] = {
    **dict.fromkeys(("lora", "qlora", "rslora", "dora", "pissa", "adalora"), _lora),
    "vera": _vera,
    "oft": _oft,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "bitfit": _bitfit,
    "adapter_houlsby": lambda adapter, shape: _bottlenecks(adapter, shape, 2),
    "adapter_pfeiffer": lambda adapter, shape: _bottlenecks(adapter, shape, 1),
    "adapter_parallel": lambda adapter, shape: _bottlenecks(adapter, shape, 1),
    **dict.fromkeys(("prefix_tuning", "p_tuning_v2"), _prefix),
    "mam": lambda adapter, shape: [*_prefix(adapter, shape), *_bottlenecks(adapter, shape, 1)],
    "unipelt": _unipelt,
    **dict.fromkeys(("loreft", "direft"), _reft),
    **dict.fromkeys(("prompt_tuning", "p_tuning"), _soft_prompt),
}
