"""The copy that rollouts are sampled from: adapter merged, trained weights untouched, gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pipeline.generation.whole import Whole
from tests.generation.test_static import build
from tests.support.tiny import SHAPES

pytestmark = pytest.mark.fast
IDS = torch.tensor([[5, 20, 31, 42, 7, 60, 61], [33, 33, 8, 90, 91, 2, 3]])


def adapted(shape: str) -> Any:
    """A random model with two random adapters on all its linear layers."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft = get_peft_model(build(shape), config, adapter_name="one").eval()
    peft.add_adapter("two", config)
    return peft


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_each_adapter_is_merged(shape: str) -> None:
    peft = adapted(shape)
    inner = peft.get_base_model()
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    whole = Whole(inner)
    for adapter in ("one", "two"):
        peft.set_adapter(adapter)
        expected = logits(inner)
        with whole.of(adapter, sharded=False) as model:
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
            assert not any("lora" in name for name, _ in model.named_parameters())
    with peft.disable_adapter(), whole.of(None, sharded=False) as model:
        torch.testing.assert_close(logits(model), logits(inner), rtol=0, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())


def test_weights_are_those_of_the_moment() -> None:
    peft = adapted("llama")
    inner = peft.get_base_model()
    whole = Whole(inner)
    with whole.of("one", sharded=False) as model:
        first = logits(model)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_B.one" in name:
                parameter.mul_(-1.0)
    with whole.of("one", sharded=False) as model:
        assert not torch.allclose(logits(model), first, atol=1e-3)
        torch.testing.assert_close(logits(model), logits(inner), rtol=0, atol=1e-4)


def test_only_adapted_layers_are_copied_and_only_meanwhile() -> None:
    peft = adapted("llama")
    inner = peft.get_base_model()
    known = {value.data_ptr() for value in inner.parameters()}
    whole = Whole(inner)
    with whole.of("one", sharded=False) as model:
        copied = {name for name, value in model.named_parameters() if value.data_ptr() not in known}
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert copied == {f"{name}.weight" for name in linear if name != "lm_head"}
        assert not any(value.requires_grad for name, value in model.named_parameters() if name in copied)
    assert {value.data_ptr() for value in whole.model.parameters()} <= known
    assert any(value.requires_grad for value in inner.parameters())


def test_bfloat16_is_merged_in_float32() -> None:
    """Each merged weight is the bf16 number nearest to W + BA added in float32 (BA as the adapter's dtype gives it)."""
    peft = adapted("llama").to(torch.bfloat16)
    inner = peft.get_base_model()
    layer = inner.model.layers[0].mlp.up_proj
    delta = layer.get_delta_weight("one").double()
    expected = (layer.base_layer.weight.double() + delta).float().to(torch.bfloat16)
    with Whole(inner).of("one", sharded=False) as model:
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
