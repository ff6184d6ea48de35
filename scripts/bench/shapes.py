"""Random models of published shapes with a tokenizer of plain words, and prompts for them: what both sides are given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

PAD, UNKNOWN, EOS, FIRST = 0, 1, 2, 3
"""Special tokens' ids, and the first word's."""


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )


SHAPES: dict[str, Any] = {
    # Llama of llama2.c's stories15M: 15.2 million weights.
    "llama-15m": lambda: LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    # Eight times that: 122 million.
    "llama-120m": lambda: LlamaConfig(
        vocab_size=32000,
        hidden_size=864,
        intermediate_size=2304,
        num_hidden_layers=10,
        num_attention_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    # Llama-3.2-1B.
    "llama-1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    # Llama-2-13B, CodeLlama-34B, Llama-2-70B.
    "llama-13b": lambda: _llama(5120, 13824, 40, 40, 40),
    "llama-34b": lambda: _llama(8192, 22016, 48, 64, 8),
    "llama-70b": lambda: _llama(8192, 28672, 80, 64, 8),
    # facebook/opt-1.3b.
    "opt-1.3b": lambda: OPTConfig(
        vocab_size=50272,
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        max_position_embeddings=2048,
    ),
}


def write(folder: Path, shape: str, *, ends: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
    """A random model of `shape` in `folder`, whose every token is EOS with probability `ends` (Llama shapes only)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(shape), dtype=dtype)
    if model.config.model_type == "llama":
        _end_with(model, ends)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    model.save_pretrained(folder)
    words(folder, model.config.vocab_size)


def config(shape: str) -> Any:
    found = SHAPES[shape]()
    found.pad_token_id, found.bos_token_id, found.eos_token_id = PAD, None, EOS
    return found


def words(folder: Path, vocabulary: int) -> None:
    """A tokenizer of `vocabulary` words in `folder`."""
    known = {"<pad>": PAD, "<unk>": UNKNOWN, "<eos>": EOS, **{f"w{i}": i for i in range(FIRST, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)


@torch.no_grad()
def _end_with(model: Any, share: float) -> None:
    """Make EOS as likely as `share` after every token: the last hidden state's first entry is held constant, and EOS's row
    of the (tied) output head reads it."""
    weight = model.get_input_embeddings().weight
    level = float(weight.float().norm(dim=1).mean())
    weight[:, 0] = level
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    ids = torch.randint(FIRST, weight.shape[0], (8, 64), generator=torch.Generator().manual_seed(1))
    hidden = model.model(input_ids=ids).last_hidden_state.float()
    # An advantage over the other tokens' mean exponential, of which EOS without one has a share of 1 / V.
    wanted = math.log(share / (1 - share) * (weight.shape[0] - 1)) if share else -20.0
    weight[EOS] = 0.0
    others = hidden.reshape(-1, hidden.shape[-1]) @ weight.float().T
    typical = float(others[:, FIRST:].exp().mean(1).log().mean())
    weight[EOS, 0] = (typical + wanted) / float(hidden[..., 0].mean())


def prompts(folder: Path, count: int, tokens: int, vocabulary: int) -> Path:
    """`count` random prompts of `tokens` words each, as a JSONL file."""
    draw = torch.Generator().manual_seed(2)
    rows = torch.randint(FIRST, vocabulary, (count, tokens), generator=draw).tolist()
    file = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def end_share(tokens: int, mean: float) -> float:
    """The probability of EOS per token at which responses of at most `tokens` have `mean` tokens (a geometric law, cut)."""
    low, high = 1e-9, 0.999
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - (1 - middle) ** tokens) / middle > mean else (low, middle)
    return low


def rule(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The reward of both sides: the share of different words in a reply."""
    return [len(set(reply.split())) / max(1, len(reply.split())) for reply in responses]
