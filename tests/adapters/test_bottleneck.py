"""Bottleneck adapters and low-rank updates against their formulas, in NumPy at double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from pipeline.adapters.bottleneck import Bottleneck, Wire
from pipeline.adapters.hybrid import HybridConfig
from tests.support.tiny import build
from tests.support.tuners import adapted, count, disturb, padded, watched, weights

pytestmark = pytest.mark.fast

BATCH = padded([[7, 12, 33, 41, 8], [5, 90, 6]], "right")


def relu(x: Any) -> Any:
    return np.maximum(x, 0.0)


def gelu(x: Any) -> Any:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def bottleneck(p: dict[str, Any], hidden: Any, activation: Any) -> Any:
    return activation(hidden @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]


@pytest.mark.parametrize(
    ("shape", "modules"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("qwen2", ["self_attn.o_proj", "mlp.down_proj"]),
        ("opt", ["self_attn.out_proj", "fc2"]),
        ("gpt2", ["attn.c_proj", "mlp.c_proj"]),
    ],
)
def test_sequential(shape: str, modules: list[str]) -> None:
    """Houlsby: y + U gelu(D y + b) + c after both sublayers."""
    model = adapted("houlsby", shape)
    blocks = [name for name, m in model.named_modules() if name.endswith(".1") and hasattr(m, "forward")]
    block = model.get_submodule(next(name for name in blocks if name.rpartition(".")[0].endswith(("layers", "h"))))
    for name in modules:
        layer = block.get_submodule(name)
        _, y = watched(layer.base_layer, lambda: model(**BATCH))
        _, found = watched(layer, lambda: model(**BATCH))
        np.testing.assert_allclose(found, y + bottleneck(weights(layer.ext["policy"].sequential), y, gelu), atol=2e-4)
        assert np.abs(found - y).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "module", "tap"), [("llama", "mlp", None), ("opt", "fc2", "fc1"), ("gpt2", "mlp", None)]
)
def test_parallel(shape: str, module: str, tap: str | None) -> None:
    """y + s (U relu(D x + b) + c), x the MLP's input, s = 2.5; in OPT that input is fc1's."""
    model = adapted("parallel", shape)
    block = next(m for name, m in model.named_modules() if name.endswith((".layers.1", ".h.1")))
    layer = block.get_submodule(module)
    x, y = watched(layer.base_layer, lambda: model(**BATCH))
    if tap is not None:
        x, _ = watched(block.get_submodule(tap), lambda: model(**BATCH))
    _, found = watched(layer, lambda: model(**BATCH))
    p = weights(layer.ext["policy"].parallel)
    np.testing.assert_allclose(found, y + 2.5 * bottleneck(p, x, relu), atol=2e-4)


@pytest.mark.parametrize(("shape", "module"), [("llama", "v_proj"), ("gpt2", "c_attn")])
@pytest.mark.parametrize("gated", [False, True])
def test_low_rank(shape: str, module: str, gated: bool) -> None:
    """y + g(x) (alpha / r) B A x."""
    config = HybridConfig(lora_modules=[module], lora_r=4, lora_alpha=6, gating=gated, task_type="CAUSAL_LM")
    model = get_peft_model(build(shape), config, adapter_name="policy").eval()
    disturb(model, "policy")
    layer = next(
        m for name, m in model.named_modules() if name.endswith(f"1.self_attn.{module}") or ".1.attn.c_attn" in name
    )
    x, y = watched(layer.base_layer, lambda: model(**BATCH))
    _, found = watched(layer, lambda: model(**BATCH))
    p = weights(layer.ext["policy"].lora)
    gate = sigmoid(x @ p["gate.linear.weight"].T + p["gate.linear.bias"]) if gated else 1.0
    np.testing.assert_allclose(found, y + gate * (6 / 4) * (x @ p["down.weight"].T @ p["up.weight"].T), atol=2e-4)


@pytest.mark.parametrize(("shape", "module"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_merged_low_rank(shape: str, module: list[str]) -> None:
    config = HybridConfig(lora_modules=module, lora_r=4, task_type="CAUSAL_LM")
    model = get_peft_model(build(shape), config, adapter_name="policy").eval()
    disturb(model, "policy")
    with torch.no_grad():
        wanted, plain = model(**BATCH).logits, build(shape)(**BATCH).logits
        model.merge_adapter()
        assert torch.allclose(model(**BATCH).logits, wanted, atol=1e-3)
        model.unmerge_adapter()
        assert torch.allclose(model(**BATCH).logits, wanted, atol=1e-3)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(**BATCH).logits, wanted, atol=1e-3)
        assert not torch.allclose(wanted, plain, atol=1e-1)


def test_houlsby_init_is_nearly_the_identity() -> None:
    """All weights within two standard deviations of 0.01, none of the two layers zero, biases zero."""
    torch.manual_seed(0)
    part = Bottleneck(64, 64, 32, "relu", 1.0, 0.0, "houlsby", gated=False)
    for layer in (part.down, part.up):
        assert layer.weight.abs().max() <= 2e-2
        assert abs(layer.weight.std().item() - 0.0088) < 5e-4  # sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = 0.8796 of 0.01
        assert not layer.bias.any()
    hidden = torch.randn(10, 64)
    change = part(hidden, hidden) - hidden
    assert 0.0 < change.std() < 5e-3  # expected: 0.0088 sqrt(64) through ReLU, 0.0088 sqrt(32 / 2) again: 0.0025 of 1


def test_dropout_is_of_the_change_alone() -> None:
    part = Bottleneck(8, 8, 4, "relu", 1.0, 0.5, "houlsby", gated=False).train()
    hidden = torch.randn(200, 8)
    change = part(hidden, hidden) - hidden
    assert 0.3 < (change == 0).float().mean() < 0.7
    part.eval()
    assert torch.equal(part(hidden, hidden), part(hidden, hidden))


def test_wire() -> None:
    wire = Wire()
    wire.put(1)
    assert wire.take() == 1
    with pytest.raises(RuntimeError, match="another order"):
        wire.take()


@pytest.mark.parametrize(
    ("method", "shape", "number"),
    [
        # 2 blocks of width 64, bottleneck 5: D 5 x 64, b 5, U 64 x 5, c 64
        ("houlsby", "llama", 2 * 2 * (5 * 64 + 5 + 64 * 5 + 64)),
        ("pfeiffer", "gpt2", 2 * (5 * 64 + 5 + 64 * 5 + 64)),
        ("parallel", "opt", 2 * (5 * 64 + 5 + 64 * 5 + 64)),
        ("parallel", "llama", 2 * (5 * 64 + 5 + 64 * 5 + 64)),
    ],
)
def test_parameters(method: str, shape: str, number: int) -> None:
    assert count(adapted(method, shape)) == number
