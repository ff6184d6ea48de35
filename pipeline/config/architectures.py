"""What modules are called in each family of decoders: the only knowledge of models that fine-tuning methods need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Names:
    """Names of modules inside a block, as PEFT matches them: a module whose path ends so.

    query               where a prefix sits: the layer that makes queries (or all of queries, keys and values)
    query_value         what LoRA adapts in UniPELT
    key_value           what IA3 scales in attention
    attention_output    the last layer of attention
    feed_forward        the feed-forward module, or its last layer where it has no module of its own
    feed_forward_input  its first layer, where it has no module of its own; else nothing
    feed_forward_output its last layer
    norms               the block's norms
    blocks              the list of blocks
    """

    query: tuple[str, ...]
    query_value: tuple[str, ...]
    key_value: tuple[str, ...]
    attention_output: tuple[str, ...]
    feed_forward: tuple[str, ...]
    feed_forward_output: tuple[str, ...]
    norms: tuple[str, ...]
    blocks: tuple[str, ...] = ("layers",)
    feed_forward_input: tuple[str, ...] = ()


LLAMA = Names(
    query=("q_proj",),
    query_value=("q_proj", "v_proj"),
    key_value=("k_proj", "v_proj"),
    attention_output=("o_proj",),
    feed_forward=("mlp",),
    feed_forward_output=("down_proj",),
    norms=("input_layernorm", "post_attention_layernorm"),
)

ARCHITECTURES: dict[str, Names] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"), LLAMA),
    "phi3": replace(LLAMA, query=("qkv_proj",), query_value=("qkv_proj",), key_value=("qkv_proj",)),
    "opt": replace(
        LLAMA,
        attention_output=("out_proj",),
        feed_forward=("fc2",),
        feed_forward_input=("fc1",),
        feed_forward_output=("fc2",),
        norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    "gpt2": Names(
        query=("c_attn",),
        query_value=("c_attn",),
        key_value=("c_attn",),
        attention_output=("attn.c_proj",),
        feed_forward=("mlp",),
        feed_forward_output=("mlp.c_proj",),
        norms=("ln_1", "ln_2"),
        blocks=("h",),
    ),
    "gpt_neox": Names(
        query=("query_key_value",),
        query_value=("query_key_value",),
        key_value=("query_key_value",),
        attention_output=("attention.dense",),
        feed_forward=("mlp",),
        feed_forward_output=("dense_4h_to_h",),
        norms=("input_layernorm", "post_attention_layernorm"),
    ),
}
"""By `model_type` of config.json."""

HOLD_BIASES = ("llama", "opt", "gpt2", "gpt_neox")
"""Families whose config can ask for a bias on every linear layer (of OPT those whose embeddings are not projected)."""

PACK = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox")
"""Families in which rows packed into one sequence do not see each other: transformers parts them by their positions. OPT makes
its attention mask without looking at positions."""

PACK_ATTENTION = ("sdpa", "eager")
"""Attention by which that holds for several sequences at a time."""

SLOTS = tuple(slot.name for slot in fields(Names))


def names(model_type: str, given: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """The names of a family's modules, with those that a recipe gives in their place; empty for slots nobody named."""
    known: dict[str, Any] = vars(ARCHITECTURES[model_type]) if model_type in ARCHITECTURES else {}
    return {slot: tuple(given.get(slot) or known.get(slot, ())) for slot in SLOTS}
