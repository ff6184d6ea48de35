"""Soft prompts: what the embedding gives, what PeftModel's forward and generate make of it, and what cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache

from pipeline.adapters.soft_prompt import SoftPromptConfig, extend, virtual_ids
from pipeline.adapters.tuner import tuner_layers
from tests.support.tiny import build
from tests.support.tuners import adapted, config, count, disturb, logits, padded, weights

pytestmark = pytest.mark.fast

ROWS = [[7, 12, 33, 41, 8, 77, 19], [5, 90, 6], [64, 11, 23, 52, 31]]


@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
def test_vectors(method: str) -> None:
    """Id 97 + i is row i of the table, or of what three linear layers with ReLUs between make of it; others are the base's."""
    model = adapted(method, "llama")
    layer = tuner_layers(model)[0]
    p = weights(layer.ext["policy"].rows)
    wanted = p["table"]
    for place in (0, 2, 4):
        if f"mlp.{place}.weight" in p:
            wanted = wanted @ p[f"mlp.{place}.weight"].T + p[f"mlp.{place}.bias"]
            wanted = np.maximum(wanted, 0.0) if place < 4 else wanted
    ids = torch.tensor([[97, 5, 99], [0, 98, 96]])
    with torch.no_grad():
        found, table = layer(ids), layer.get_base_layer().weight
    for place, vector in {(0, 0): wanted[0], (0, 2): wanted[2], (1, 1): wanted[1]}.items():
        np.testing.assert_allclose(found[place].double().numpy(), vector, atol=1e-4)
    for place, row in {(0, 1): 5, (1, 0): 0, (1, 2): 96}.items():
        assert torch.equal(found[place], table[row])


@pytest.mark.parametrize("shape", ["llama", "opt"])
def test_start(shape: str) -> None:
    """Prompt tuning starts as rows of the base's embedding, drawn by torch's generator."""
    torch.manual_seed(3)
    plain = build(shape)  # seeds with 0
    model = get_peft_model(plain, config("prompt", shape))
    layer = tuner_layers(model)[0]
    table, found = layer.get_base_layer().weight, layer.ext["default"].rows.table
    assert all((row == table).all(1).any() for row in found)
    again = get_peft_model(build(shape), config("prompt", shape))
    assert torch.equal(tuner_layers(again)[0].ext["default"].rows.table, found)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
def test_forward(shape: str, method: str) -> None:
    """PeftModel's forward on the text alone is the model's on prompt and text, cut to the text; the loss is of the text."""
    model = adapted(method, shape)
    wanted = logits(model, ROWS, name="policy")
    labels = {}
    for side in ("right", "left"):
        for given in ({}, {"position_ids"}):
            batch = padded(ROWS, side)
            seen = batch["attention_mask"] == 1
            if not given:
                del batch["position_ids"]
            labels = {"labels": batch["input_ids"].masked_fill(~seen, -100)}
            with torch.no_grad():
                out = model(**batch, **labels)
                last = model(**batch, logits_to_keep=2).logits
            assert out.logits.shape == (3, 7, 97)
            assert torch.allclose(last, out.logits[:, -2:], atol=1e-5)
            for place, row in enumerate(wanted):
                assert torch.allclose(out.logits[place][seen[place]], row, atol=2e-4)
    total, tokens = 0.0, 0
    for row, ids in zip(wanted, ROWS, strict=True):
        # The last virtual token predicts the first of the text; that label is masked below, so T - 1 tokens are left.
        total -= torch.log_softmax(row[:-1], -1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum().item()
        tokens += len(ids) - 1
    with torch.no_grad():
        shifted = padded(ROWS, "right")
        marked = shifted["input_ids"].masked_fill(shifted["attention_mask"] == 0, -100)
        marked[:, 0] = -100
        assert abs(model(**shifted, labels=marked).loss.item() - total / tokens) < 1e-4


def test_generate() -> None:
    """PeftModel's generate returns texts without virtual tokens, the same ones from either side of a batch."""
    for shape in ("llama", "gpt2", "opt"):
        model = adapted("prompt", shape)
        prompt = virtual_ids(model, "policy")
        inner = model.get_base_model()
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        wanted = []
        for row in ROWS:
            ids = torch.tensor([prompt + row])
            wanted.append(inner.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 3:].tolist())
        batch = padded(ROWS, "left")
        found = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        for place, row in enumerate(wanted):
            texts = [token for token in found[place].tolist() if token != 0]
            assert texts == [token for token in row if token != 0]
        record = model.generate(
            input_ids=torch.tensor([ROWS[0]]), return_dict_in_generate=True, max_length=12, do_sample=False
        )
        assert record.sequences[0, :7].tolist() == ROWS[0]
        assert record.sequences.shape[1] <= 12
        with model.disable_adapter():
            plain = model.generate(input_ids=torch.tensor([ROWS[0]]), **options)
        assert plain.tolist() == build(shape).generate(input_ids=torch.tensor([ROWS[0]]), **options).tolist()


@pytest.mark.parametrize("shape", ["llama", "gpt2", "opt"])
def test_cached_steps(shape: str) -> None:
    """Token by token with a cache, through PeftModel's forward: the prompt goes in once."""
    model = adapted("p_tuning", shape)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        told = DynamicCache(config=model.config)
        model(input_ids=ids[:, :6], past_key_values=told, use_cache=True)
        last = model(
            input_ids=ids[:, 6:], past_key_values=told, use_cache=True, position_ids=torch.tensor([[6]])
        ).logits
        assert torch.allclose(last, wanted[:, 6:], atol=2e-4)
        cache = DynamicCache(config=model.config)
        found = [model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True).logits]
        for place in range(4, 7):
            seen = torch.ones(1, place + 1, dtype=torch.int64)
            found.append(
                model(
                    input_ids=ids[:, place : place + 1], attention_mask=seen, past_key_values=cache, use_cache=True
                ).logits
            )
    assert torch.allclose(torch.cat(found, 1), wanted, atol=2e-4)


def test_virtual_ids() -> None:
    model = adapted("prompt", "llama")
    model.add_adapter("longer", SoftPromptConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    assert virtual_ids(model, "policy") == [97, 98, 99]
    assert virtual_ids(model.get_base_model(), "longer") == [97, 98, 99, 100, 101]
    assert virtual_ids(model, None) == virtual_ids(model, "nobody") == []
    assert virtual_ids(build("llama"), "policy") == virtual_ids(adapted("mam", "llama"), "policy") == []
    model.set_adapter("longer")
    disturb(model, "longer")
    with torch.no_grad():
        assert model(input_ids=torch.tensor([ROWS[0]])).logits.shape == (1, 7, 97)


def test_embedding_table_is_not_saved(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    adapted("prompt", "gpt2").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "base_model.model.transformer.wte.ext.rows.table": (3, 64)
    }


def test_parameters() -> None:
    """n D; n D + D e + e + e e + e + e D + D. OPT's embedding here is 32 wide."""
    assert count(adapted("prompt", "llama")) == 3 * 64
    assert count(adapted("prompt", "opt")) == 3 * 32
    assert count(adapted("p_tuning", "llama")) == 3 * 64 + 64 * 6 + 6 + 6 * 6 + 6 + 6 * 64 + 64


def test_extend() -> None:
    """Two rows padded on the left, by hand."""
    given = {
        "input_ids": torch.tensor([[0, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
        "labels": torch.tensor([[-100, 5], [6, 7]]),
    }
    found = extend(given, [97, 98])
    assert found["input_ids"].tolist() == [[97, 98, 0, 5], [97, 98, 6, 7]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 1, 2], [0, 1, 2, 3]]
    assert found["labels"].tolist() == [[-100, -100, -100, 5], [-100, -100, 6, 7]]
    assert extend({**given, "position_ids": torch.tensor([[0, 0], [0, 1]])}, [97, 98])["position_ids"].tolist() == [
        [0, 1, 2, 2],
        [0, 1, 2, 3],
    ]


def test_refusals() -> None:
    model = adapted("prompt", "llama")
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(ValueError, match="packed into one row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="virtual_ids"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 7, 64))
    with pytest.raises(ValueError, match="repetition_penalty"):
        model.generate(input_ids=ids, repetition_penalty=1.2, max_new_tokens=2)
    with pytest.raises(ValueError, match="at least 1"):
        SoftPromptConfig(num_virtual_tokens=0)
