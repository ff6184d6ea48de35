"""Every method on nf4 weights: gradients after a rollout are those of a dense model that holds the same values.

bitsandbytes repacks 4-bit weights on AVX512-BF16 CPUs in the first forward of a model that does not train; forwards that do
then have wrong gradients, without a warning. `pipeline.model.load` keeps it from that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapters import build
from pipeline.config.methods import METHODS
from pipeline.config.schema import Base
from pipeline.model import load
from tests.support import tiny
from tests.support.methods import adapter

pytestmark = pytest.mark.fast

TEXT = torch.tensor([[5, 9, 33, 17, 60, 21, 8, 44]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A random Llama whose layers are wide enough to be packed by bitsandbytes' CPU kernels."""
    folder = tiny.model(tmp_path_factory.mktemp("packed") / "llama", hidden_size=128, intermediate_size=256)
    return Base(model=str(folder), dtype="bf16", quantization="nf4")


def gradients(model: Any, method: str) -> torch.Tensor:
    """Of a text's loss by the trained parameters, in one row, after a forward as a rollout makes it."""
    torch.manual_seed(1)
    adapted = build.attach(model, adapter(method), "CAUSAL_LM", name="policy", steps=100)
    parameters = build.trained(adapted, "policy")
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
        adapted.eval()(input_ids=TEXT, use_cache=False)
    adapted.train()(input_ids=TEXT, labels=TEXT, use_cache=False).loss.backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    ).float()


def alike(base: Base, method: str) -> float:
    """Cosine between the gradients on packed and on dense weights."""
    tok = load.tokenizer(base.model)
    packed = gradients(load.causal(base, tok, sharded=False), method)
    dense = gradients(load.causal(base, tok, sharded=False).dequantize(), method)
    return float(torch.nn.functional.cosine_similarity(packed, dense, dim=0))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].four_bit])
def test_gradients_after_a_rollout(base: Base, method: str) -> None:
    assert alike(base, method) > 0.99


@pytest.mark.skipif(
    "avx512_bf16" not in Path("/proc/cpuinfo").read_text(), reason="no AVX512-BF16: nothing is repacked"
)
def test_without_the_guard_gradients_are_wrong(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard is there for; when this fails, bitsandbytes has mended it and the guard can go."""
    monkeypatch.setattr(load, "_keep_gradients", lambda model: None)
    assert alike(base, "lora") < 0.9
