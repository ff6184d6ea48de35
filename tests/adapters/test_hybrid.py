"""Combinations: what UniPELT and MAM put together, what names must fit, and what configs refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from pipeline.adapters.hybrid import HybridConfig
from pipeline.errors import UserError
from tests.support.tiny import build
from tests.support.tuners import adapted, config, count, disturb, logits, padded, watched, weights

pytestmark = pytest.mark.fast

ROWS = [[7, 12, 33, 41, 8], [5, 90, 6]]


def test_gates_of_unipelt() -> None:
    """y + g(y) (U relu(D y + b) + c), each token its own gate."""
    model = adapted("unipelt", "llama")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    batch = padded(ROWS, "right")
    _, y = watched(layer.base_layer, lambda: model(**batch))
    _, found = watched(layer, lambda: model(**batch))
    p = weights(layer.ext["policy"].sequential)
    gate = 1.0 / (1.0 + np.exp(-(y @ p["gate.linear.weight"].T + p["gate.linear.bias"])))
    change = np.maximum(y @ p["down.weight"].T + p["down.bias"], 0.0) @ p["up.weight"].T + p["up.bias"]
    np.testing.assert_allclose(found, y + gate * change, atol=2e-4)
    assert gate.shape == (2, 5, 1)
    assert gate.std() > 1e-2


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_no_token_sees_those_after_it(shape: str) -> None:
    model = adapted("unipelt", shape)
    short, long = logits(model, [ROWS[0][:3]])[0], logits(model, [ROWS[0]])[0]
    assert torch.allclose(short, long[:3], atol=1e-4)


def test_low_rank_part_is_peft_s_lora() -> None:
    """With equal weights the LoRA component and PEFT's own LoRA give equal logits."""
    ours = get_peft_model(
        build("llama"),
        HybridConfig(lora_modules=["q_proj", "down_proj"], lora_r=4, lora_alpha=8, task_type="CAUSAL_LM"),
    ).eval()
    disturb(ours, "default")
    theirs = get_peft_model(
        build("llama"), LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=8, task_type="CAUSAL_LM")
    ).eval()
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if ".ext.default." in name:
                name = name.replace(".ext.default.lora.down", ".lora_A.default")
                parameters[name.replace(".ext.default.lora.up", ".lora_B.default")].copy_(value)
    for found, wanted in zip(logits(ours, ROWS), logits(theirs, ROWS), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_parameters() -> None:
    """UniPELT on llama: in each of 2 layers LoRA on q (64 -> 64) and v (64 -> 32), a prefix, one adapter, and four gates."""
    lora = 4 * (64 + 64) + 4 * (64 + 32) + 2 * 65
    prefix = 3 * 2 * 2 * 16 + 65
    adapter = 5 * 64 + 5 + 64 * 5 + 64 + 65
    assert count(adapted("unipelt", "llama")) == 2 * (lora + prefix + adapter)
    assert count(adapted("mam", "llama")) == 2 * (3 * 2 * 2 * 16 + 5 * 64 + 5 + 64 * 5 + 64)


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ("gpt2", {"lora_modules": ["q_proj"]}, "no module q_proj"),
        ("llama", {"prefix_modules": ["q_proj"], "sequential_modules": ["down_proj", "fc2"]}, "no module fc2"),
        ("opt", {"parallel_modules": ["mlp"]}, "no module mlp"),
        ("opt", {"parallel_modules": ["fc2"], "parallel_inputs": ["project_in"]}, "has no project_in"),
        ("llama", {"parallel_modules": ["mlp"], "lora_modules": ["up_proj"]}, "which is inside"),
    ],
)
def test_names_that_fit_nothing(shape: str, options: dict[str, Any], match: str) -> None:
    """Refused for the first adapter and for a second one; the model is then as it was."""
    wrong = HybridConfig(task_type="CAUSAL_LM", **options)
    with pytest.raises(UserError, match=match):
        get_peft_model(build(shape), wrong)
    model = adapted("pfeiffer", shape)
    before = logits(model, ROWS)
    with pytest.raises(UserError, match=match):
        model.add_adapter("other", wrong)
    assert list(model.peft_config) == ["policy"]
    assert not [name for name, _ in model.named_parameters() if ".other." in name]
    assert all(torch.equal(a, b) for a, b in zip(logits(model, ROWS), before, strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "needs modules"),
        ({"lora_modules": "q_proj"}, "must be a list"),
        ({"parallel_modules": ["a"], "parallel_inputs": ["b", "c"]}, "one for one"),
        ({"lora_modules": ["q"], "init": "ones"}, "'houlsby'"),
        ({"lora_modules": ["q"], "non_linearity": "nothing"}, "activations"),
        ({"lora_modules": ["q"], "lora_r": 0}, "at least 1"),
    ],
)
def test_config_refusals(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HybridConfig(**options)


def test_config_file(tmp_path: Path) -> None:
    """Lists are sorted, pairs of parallel modules and inputs together; what is read is what was written."""
    written = HybridConfig(
        lora_modules=["v_proj", "q_proj"], parallel_modules=["z", "b"], parallel_inputs=["y", "c"], scaling=4.0
    )
    written.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["lora_modules"] == ["q_proj", "v_proj"]
    assert (values["parallel_modules"], values["parallel_inputs"]) == (["b", "z"], ["c", "y"])
    assert values["target_modules"] == ["b", "c", "q_proj", "v_proj", "y", "z"]
    assert PeftConfig.from_pretrained(tmp_path) == written


def test_two_adapters_of_other_modules() -> None:
    """A second adapter may sit elsewhere than the first; each acts alone."""
    model = adapted("pfeiffer", "llama")
    alone = logits(model, ROWS)
    model.add_adapter("other", config("mam", "llama"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(logits(model, ROWS), alone, strict=True))
    model.set_adapter("other")
    assert not torch.allclose(logits(model, ROWS)[0], alone[0], atol=1e-2)
