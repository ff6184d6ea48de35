"""Attention with a prefix against the formula, in NumPy at double precision, and where prefixes are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters.hybrid import HybridConfig
from pipeline.adapters.prefix import ATTENTION
from pipeline.errors import UserError
from tests.support.tiny import build
from tests.support.tuners import adapted, config, count, logits, padded, watched, weights

pytestmark = pytest.mark.fast

ROW = [7, 12, 33, 41, 8, 77]


def rotated(x: Any, base: float = 10000.0) -> Any:
    """RoPE (2104.09864) of [T, heads, size] at positions 0 to T - 1, halves rotated against each other as Llama does."""
    length, _, size = x.shape
    angle = np.arange(length)[:, None] / base ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: Any, k: Any, v: Any, prefix_k: Any, prefix_v: Any, gate: Any = None) -> Any:
    """Causal attention [T, heads * size] of q [T, heads, size], k and v [T, key-value heads, size] and prefixes [n, ...]."""
    length, heads, size = q.shape
    group, n = heads // k.shape[1], len(prefix_k)
    out = np.zeros((length, heads, size))
    for head in range(heads):
        keys = np.concatenate([prefix_k[:, head // group], k[:, head // group]])
        values = np.concatenate([prefix_v[:, head // group], v[:, head // group]])
        for t in range(length):
            seen = n + t + 1
            weight = np.exp(keys[:seen] @ q[t, head] / np.sqrt(size))
            if gate is not None:
                weight[:n] *= gate[t]
            out[t, head] = (weight / weight.sum()) @ values[:seen]
    return out.reshape(length, heads * size)


def columns(part: dict[str, Any], heads: int, size: int) -> Any:
    """Prefix keys and values [n, heads, size]."""
    rows = part["rows.table"]
    if "rows.mlp.0.weight" in part:
        hidden = np.tanh(rows @ part["rows.mlp.0.weight"].T + part["rows.mlp.0.bias"])
        rows = hidden @ part["rows.mlp.2.weight"].T + part["rows.mlp.2.bias"]
    return np.moveaxis(rows.reshape(len(rows), 2, heads, size), 1, 0)


@pytest.mark.parametrize("method", ["prefix", "p_tuning_v2", "gated"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "opt"])
def test_attention(method: str, shape: str) -> None:
    """softmax over [prefix, text] of q k / sqrt(size), the prefix's exponentials times the token's gate where there is one."""
    model = adapted("p_tuning_v2", shape, gating=True) if method == "gated" else adapted(method, shape)
    block = next(m for name, m in model.named_modules() if name.endswith((".layers.0", ".h.0")))
    batch = padded([ROW], "right")

    def run() -> None:
        model(**batch)

    shared = 2 if shape == "llama" else 4
    if shape == "gpt2":
        x, qkv = watched(block.attn.c_attn, run)
        q, k, v = np.split(qkv[0], 3, axis=-1)
        part, out = weights(block.attn.c_attn.ext["policy"].prefix), block.attn.c_proj
    else:
        x, q = watched(block.self_attn.q_proj, run)
        k, v = (watched(block.self_attn.get_submodule(name), run)[1][0] for name in ("k_proj", "v_proj"))
        q, part = q[0], weights(block.self_attn.q_proj.ext["policy"].prefix)
        out = block.self_attn.o_proj if shape == "llama" else block.self_attn.out_proj
    q, k, v = (a.reshape(len(ROW), -1, 16) for a in (q, k, v))
    if shape == "llama":
        q, k = rotated(q), rotated(k)
    gate = None
    if method == "gated":
        gate = 1.0 / (1.0 + np.exp(-(x[0] @ part["gate.linear.weight"][0] + part["gate.linear.bias"][0])))
    prefix_k, prefix_v = columns(part, shared, 16)
    found, _ = watched(out, run)
    np.testing.assert_allclose(found[0], attend(q, k, v, prefix_k, prefix_v, gate), atol=2e-4)
    assert np.abs(found[0] - attend(q, k, v, prefix_k[:0], prefix_v[:0])).max() > 1e-2


def test_packed_masks_and_float_masks_agree() -> None:
    """A 4-D mask of booleans, one of numbers, and none at all for a causal row."""
    model = adapted("mam", "llama").get_base_model()
    ids, seen = torch.tensor([ROW]), torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    numbers = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        for mask in (seen, numbers):
            assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits, wanted, atol=1e-5)


def test_two_prefixes_at_once() -> None:
    """Two active adapters: both sets of columns are seen, in the order of the adapters; order does not change attention."""
    model = adapted("p_tuning_v2", "llama")
    model.add_adapter("more", HybridConfig(prefix_modules=["q_proj"], num_virtual_tokens=2, task_type="CAUSAL_LM"))
    found = []
    for names in (["policy", "more"], ["more", "policy"]):
        model.base_model.set_adapter(names)
        found.append(logits(model, [ROW])[0])
    model.set_adapter("policy")
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert not torch.allclose(found[0], logits(model, [ROW])[0], atol=1e-3)


def test_unload_restores_attention() -> None:
    model = adapted("p_tuning_v2", "llama")
    assert model.config._attn_implementation == ATTENTION
    assert model.unload().config._attn_implementation == "sdpa"


def test_other_attention_is_refused() -> None:
    with pytest.raises(UserError, match="attention eager"):
        get_peft_model(build("llama", attention="eager"), config("prefix", "llama"))


def test_capped_scores_are_refused() -> None:
    shape = AutoConfig.for_model(
        "gemma2",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
    )
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    with pytest.raises(UserError, match="caps its attention scores"):
        get_peft_model(model, config("prefix", "llama"))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("method", "shape", "number"),
    [
        # 2 layers, n 3, hidden 64, encoder 7; llama: 2 key-value heads of 16, the others 4
        ("p_tuning_v2", "llama", 2 * (3 * 2 * 2 * 16)),
        ("p_tuning_v2", "gpt2", 2 * (3 * 2 * 4 * 16)),
        ("prefix", "llama", 2 * (3 * 64 + 64 * 7 + 7 + 7 * 64 + 64)),
        ("prefix", "opt", 2 * (3 * 64 + 64 * 7 + 7 + 7 * 128 + 128)),
    ],
)
def test_parameters(method: str, shape: str, number: int) -> None:
    assert count(adapted(method, shape)) == number
