"""Every method on nf4 weights, on every family: gradients after a rollout are those of a dense model that holds the same
values, and what merges can be written out as a model in 16 bits. GPT-2's layers, which are transposed, lie as linear ones
when they are packed.

bitsandbytes repacks 4-bit weights on AVX512-BF16 CPUs in the first forward of a model that does not train; forwards that do
then have wrong gradients, without a warning. `pipeline.model.load` keeps it from that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import handoff
from pipeline.adapters import build
from pipeline.config.methods import METHODS
from pipeline.config.schema import Base
from pipeline.model import begin, load
from tests.support import tiny
from tests.support.methods import FAMILIES, adapter, fits

pytestmark = pytest.mark.fast

TEXT = torch.tensor([[5, 9, 33, 17, 60, 21, 8, 44]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """A random model of each family whose layers are wide enough to be packed by bitsandbytes' CPU kernels."""
    folder = tmp_path_factory.mktemp("packed")
    found = {family: tiny.model(folder / family, family, **tiny.WIDE[family]) for family in FAMILIES}
    return {family: Base(model=str(path), dtype="bf16", quantization="nf4") for family, path in found.items()}


def moved(model: Any, method: str, by: float) -> Any:
    """`model` with an adapter that noise of standard deviation `by` moved from its start."""
    torch.manual_seed(1)
    adapted = build.attach(model, adapter(method), "CAUSAL_LM", name="policy", steps=100)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in build.trained(adapted, "policy"):
            parameter.add_(by * torch.randn(parameter.shape, generator=noise))
    return adapted


def gradients(model: Any, method: str) -> torch.Tensor:
    """Of a text's loss by the trained parameters, in one row, after a forward as a rollout makes it."""
    adapted = moved(model, method, 0.02)
    parameters = build.trained(adapted, "policy")
    with torch.no_grad():
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


CASES = [(m, family) for m in METHODS for family in FAMILIES if METHODS[m].four_bit and fits(m, family)]


@pytest.mark.parametrize(("method", "family"), CASES, ids=map("-".join, CASES))
def test_gradients_after_a_rollout(bases: dict[str, Base], method: str, family: str) -> None:
    assert alike(bases[family], method) > 0.99


MERGED = [(m, family) for m, family in CASES if METHODS[m].mergeable and (m != "bitfit" or family in ("llama", "gpt2"))]
"""Qwen2 has no place for BitFit's biases, nor has OPT with projected embeddings."""


@pytest.mark.parametrize(("method", "family"), MERGED, ids=map("-".join, MERGED))
def test_merged_in_sixteen_bits(bases: dict[str, Base], tmp_path: Path, method: str, family: str) -> None:
    """What a stage of another method builds on: the base's packed values and the adapter, as one model on disk. All that is
    lost is bf16's rounding, little beside what the adapter changes."""
    base = bases[family]
    tok = load.tokenizer(base.model)
    adapted = moved(load.causal(base, tok, sharded=False), method, 0.2).eval()
    record = begin.base_record(base)
    facts = {"stage": "sft", "kind": "sft", "base": record, "inputs": {}}
    baton = handoff.publish(tmp_path / "sft", begin.writer(adapted, tok, record, "policy"), facts)
    load.materialise(base, baton, tmp_path / "merged", kind="causal")
    whole = base.model_copy(update={"model": str(tmp_path / "merged"), "quantization": None})
    with torch.no_grad():
        wanted = adapted(input_ids=TEXT, use_cache=False).logits.float()
        found = load.causal(whole, tok, sharded=False).eval()(input_ids=TEXT, use_cache=False).logits.float()
        with adapted.disable_adapter():
            without = adapted(input_ids=TEXT, use_cache=False).logits.float()
    assert (found - wanted).abs().mean() < 0.15 * (without - wanted).abs().mean()


@pytest.mark.skipif(
    "avx512_bf16" not in Path("/proc/cpuinfo").read_text(), reason="no AVX512-BF16: nothing is repacked"
)
def test_without_the_guard_gradients_are_wrong(bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard is there for; when this fails, bitsandbytes has mended it and the guard can go."""
    monkeypatch.setattr(load, "_keep_gradients", lambda model: None)
    assert alike(bases["llama"], "lora") < 0.9
