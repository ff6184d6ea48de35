"""BitFit: which biases change, by how much, and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.adapters.bitfit import BitFitConfig, unwritable_biases
from pipeline.adapters.tuner import tuner_layers
from pipeline.errors import UserError
from tests.support.tiny import build
from tests.support.tuners import adapted, config, count, disturb, logits, padded, watched

pytestmark = pytest.mark.fast

ROWS = [[7, 12, 33, 41, 8], [5, 90, 6]]
OWN = {  # output widths of the modules that have a bias, for each of 2 blocks and outside
    "llama": 0,
    "qwen2": 2 * (64 + 32 + 32),
    "opt": 2 * (4 * 64 + 128 + 64 + 2 * 64),
    "gpt2": 2 * (192 + 64 + 256 + 64 + 2 * 64) + 64,
}
MISSING = {  # and of the linear layers that have none
    "llama": 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64),
    "qwen2": 2 * (64 + 128 + 128 + 64),
    "opt": 64 + 32,  # project_in and project_out
    "gpt2": 0,
}


@pytest.mark.parametrize("shape", ["llama", "qwen2", "opt", "gpt2"])
def test_which_biases(shape: str) -> None:
    assert count(adapted("bitfit", shape)) == OWN[shape] + MISSING[shape]
    model = adapted("bitfit", shape)
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name and ".ext." in name]


@pytest.mark.parametrize(("shape", "name"), [("llama", "q_proj"), ("opt", "self_attn_layer_norm"), ("gpt2", "ln_1")])
def test_delta(shape: str, name: str) -> None:
    """y + delta."""
    model = adapted("bitfit", shape)
    layer = next(m for n, m in model.named_modules() if n.endswith(name))
    _, y = watched(layer.base_layer, lambda: model(**padded(ROWS, "right")))
    _, found = watched(layer, lambda: model(**padded(ROWS, "right")))
    delta = layer.ext["policy"].delta.detach().double().numpy()
    assert np.abs(delta).max() > 0.1
    np.testing.assert_allclose(found, y + delta, atol=1e-5)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "opt", "gpt2"])
def test_merge(shape: str) -> None:
    model = adapted("bitfit", shape)
    wanted, plain = logits(model, ROWS), logits(build(shape), ROWS)
    model.merge_adapter()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(logits(model, ROWS), wanted, strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(logits(model, ROWS), wanted, strict=True))
    with model.disable_adapter():
        assert all(torch.equal(a, b) for a, b in zip(logits(model, ROWS), plain, strict=True))
    merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(logits(merged, ROWS), wanted, strict=True))
    assert ("model.layers.0.self_attn.q_proj.bias" in merged.state_dict()) == (shape in ("llama", "qwen2"))


def test_merged_model_can_be_written(tmp_path: Path) -> None:
    """Llama's config then asks for the biases; of Qwen2's the ones it does not know are named."""
    model = adapted("bitfit", "llama")
    wanted = logits(model, ROWS)
    merged = model.merge_and_unload()
    assert unwritable_biases(merged) == []
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(logits(loaded, ROWS), wanted, strict=True))
    assert adapted("bitfit", "llama").unload().config.attention_bias is False

    dropped = unwritable_biases(adapted("bitfit", "qwen2").merge_and_unload())
    assert len(dropped) == 2 * 4
    assert dropped[0] == "model.layers.0.mlp.down_proj.bias"
    own = adapted("bitfit", "qwen2", target_modules=["q_proj", "k_proj", "v_proj"])
    assert unwritable_biases(own.merge_and_unload()) == []


def test_two_merged_and_taken_back() -> None:
    model = adapted("bitfit", "llama")
    model.add_adapter("other", config("bitfit", "llama"))
    disturb(model, "other", seed=1)
    plain = logits(build("llama"), ROWS)
    model.merge_adapter(adapter_names=["policy", "other"])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert all(torch.equal(a, b) for a, b in zip(logits(model, ROWS), plain, strict=True))
    assert not [name for name, _ in model.named_parameters() if name.endswith("base_layer.bias")]


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ("llama", {"target_modules": ["fc1"]}, "no module fc1"),
        ("llama", {"target_modules": ["input_layernorm"]}, "has no bias"),
    ],
)
def test_refusals(shape: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        get_peft_model(build(shape), BitFitConfig(task_type="CAUSAL_LM", **options))
    model = adapted("bitfit", shape)
    with pytest.raises(UserError, match=match):
        model.add_adapter("other", BitFitConfig(task_type="CAUSAL_LM", **options))
