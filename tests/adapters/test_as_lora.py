"""An adapter that a LoRA equals, exported as one: plain PEFT gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from pipeline import handoff
from pipeline.adapters import as_lora, build
from pipeline.errors import UserError
from tests.support import tiny
from tests.support.methods import adapter, options

pytestmark = pytest.mark.fast

TOKENS = torch.tensor([[7, 8, 60, 33, 2, 19]])


def published(folder: Path, method: str, family: str = "llama") -> tuple[handoff.Baton, torch.Tensor]:
    """A baton of an adapter away from its start, and the logits of its model."""
    base = folder / "base"
    tiny.build(family).save_pretrained(base)
    torch.manual_seed(1)
    model = build.attach(tiny.build(family), adapter(method), "CAUSAL_LM", steps=100).eval()
    with torch.no_grad():
        for parameter in build.trained(model, "default"):
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = model(input_ids=TOKENS, use_cache=False).logits
    state = {n: p.detach() for n, p in model.named_parameters() if build.belongs(n, "default")}
    state |= dict(build.factors(model, "default"))
    block = {"adapter": options(method)}
    facts = {
        "stage": "sft",
        "inputs": {"block": block},
        "base": {"model": str(base), "revision": None, "content_hash": "", "quantization": None},
    }
    baton = handoff.publish(folder / "sft", lambda place: build.write(model, "default", state, place, str(base)), facts)
    return baton, expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "vera"])
def test_the_lora_gives_the_same_logits(tmp_path: Path, method: str, family: str) -> None:
    baton, expected = published(tmp_path, method, family)
    as_lora.convert(baton, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert not (tmp_path / "lora" / "manifest.json").exists()
    opened = PeftModel.from_pretrained(tiny.build(family), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=TOKENS, use_cache=False).logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["dora", "ia3", "mam"])
def test_what_no_lora_equals_is_refused(tmp_path: Path, method: str) -> None:
    baton, _ = published(tmp_path, method)
    with pytest.raises(UserError, match=f"{method} has no exact LoRA equivalent"):
        as_lora.convert(baton, tmp_path / "lora")
