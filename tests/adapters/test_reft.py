"""LoReFT and DiReFT against their formulas, in NumPy at double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from pipeline.adapters.reft import Intervention, ReftConfig, blocks
from pipeline.adapters.tuner import tuner_layers
from pipeline.errors import UserError
from tests.support.tiny import build
from tests.support.tuners import adapted, count, padded, watched, weights

pytestmark = pytest.mark.fast

BATCH = padded([[7, 12, 33, 41, 8], [5, 90, 6]], "right")


def gram_schmidt(rows: Any) -> Any:
    """Orthonormal rows, each the row less its parts along those before it: the R of QR with a positive diagonal."""
    found: list[Any] = []
    for row in rows:
        for other in found:
            row = row - (row @ other) * other
        found.append(row / np.linalg.norm(row))
    return np.array(found)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_intervention(shape: str, kind: str) -> None:
    """h + R^T (W h + b - R h), R orthonormal; h + R^T (W h + b)."""
    model = adapted(kind, shape)
    layer = tuner_layers(model)[1]
    _, h = watched(layer.base_layer, lambda: model(**BATCH))
    _, found = watched(layer, lambda: model(**BATCH))
    p = weights(layer.ext["policy"])
    rows = gram_schmidt(p["rotation"]) if kind == "loreft" else p["rotation"]
    edit = h @ p["weight"].T + p["bias"] - (h @ rows.T if kind == "loreft" else 0.0)
    np.testing.assert_allclose(found, h + edit @ rows, atol=1e-3)
    assert np.abs(edit).max() > 0.1


def test_rotation_moves_with_its_parameters() -> None:
    """Orthonormal after any update, and no jump of a sign where a QR routine flips one."""
    part = Intervention(16, 3, "loreft")
    before = part._rows().detach()
    with torch.no_grad():
        part.rotation.add_(1e-4 * torch.randn(3, 16))
    after = part._rows().detach()
    assert torch.allclose(after @ after.T, torch.eye(3), atol=1e-5)
    assert (after - before).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_parameters_and_layers(kind: str) -> None:
    """r (2 H + 1) for each block; only the blocks named."""
    assert count(adapted(kind, "llama")) == 2 * 3 * (2 * 64 + 1)
    one = adapted(kind, "llama", target_modules=["layers.1"])
    assert count(one) == 3 * (2 * 64 + 1)
    assert {name.split(".ext.")[0][-8:] for name, p in one.named_parameters() if p.requires_grad} == {"layers.1"}


def test_every_gradient_is_alive_soon() -> None:
    """The identity is no dead point: W and b move at the first step, R at the next."""
    for kind in ("loreft", "direft"):
        model = adapted(kind, "llama", trained=False).train()
        for step in range(2):
            model.zero_grad()
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
            moved = {n.rpartition(".")[2]: p.grad.abs().max() for n, p in model.named_parameters() if p.requires_grad}
            assert moved["weight"] > 0
            assert moved["bias"] > 0
            assert step == 0 or moved["rotation"] > 0
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p -= 0.1 * p.grad


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("llama", "model.layers.1"),
        ("opt", "model.decoder.layers.1"),
        ("gpt2", "transformer.h.1"),
        ("gpt_neox", "gpt_neox.layers.1"),
    ],
)
def test_blocks(shape: str, wanted: str) -> None:
    assert blocks(build(shape))[1] == wanted


def test_many_blocks() -> None:
    """PEFT shortens lists of 20 names and more; the config keeps what the user wrote."""
    model = get_peft_model(build("llama_small", num_hidden_layers=23), ReftConfig(task_type="CAUSAL_LM"))
    assert len(tuner_layers(model)) == 23
    assert model.peft_config["default"].target_modules is None


def test_a_block_that_is_not_there() -> None:
    wrong = ReftConfig(target_modules=["layers.2"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"no module layers\.2"):
        get_peft_model(build("llama"), wrong)
    with pytest.raises(UserError, match=r"no module layers\.2"):
        adapted("loreft", "llama").add_adapter("other", wrong)


@pytest.mark.parametrize(("options", "match"), [({"kind": "x"}, "kind"), ({"r": 0}, "r must")])
def test_config_refusals(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ReftConfig(**options)
