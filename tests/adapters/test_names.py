"""Names of modules in the families that Relay knows, and what it says of one it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters import build
from pipeline.config.methods import METHODS
from pipeline.errors import UserError
from tests.support.methods import adapter

pytestmark = pytest.mark.fast

FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"num_key_value_heads": 2},
    "gemma": {"head_dim": 16, "num_key_value_heads": 2},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2},
}
TOKENS = torch.tensor([[5, 9, 3, 40, 41]])


def plain(family: str) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=97, **sizes, **special, **FAMILIES.get(family, {}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "qlora")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_adapted(family: str, method: str) -> None:
    """Each method finds its modules in both blocks, and what it adds there counts."""
    model = build.attach(plain(family), adapter(method), "CAUSAL_LM", name="policy", steps=100).eval()
    named = {n: p for n, p in model.named_parameters() if build.belongs(n, "policy") and p.requires_grad}
    if METHODS[method].peft != "SOFT_PROMPT":
        for block in (".0.", ".1."):
            assert any(block in name for name in named)
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=TOKENS, use_cache=False).logits
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        on = model(input_ids=TOKENS, use_cache=False).logits
    assert (on - off).abs().max() > 1e-4


def test_a_family_that_is_not_known_is_refused_with_the_names_to_give() -> None:
    model = plain("cohere")
    with pytest.raises(UserError) as raised:
        build.attach(model, adapter("adapter_houlsby"), "CAUSAL_LM")
    message = str(raised.value)
    assert "'cohere'" in message
    assert "names for attention_output, feed_forward_output" in message
    given = adapter("adapter_houlsby").model_copy(
        update={"modules": {"attention_output": ["o_proj"], "feed_forward_output": ["down_proj"]}}
    )
    build.attach(model, given, "CAUSAL_LM")
