"""The reward model's loss: stages/reward.py trains with TRL's RewardTrainer, whose `compute_loss` is what runs here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from pipeline.data import encode
from pipeline.data.shape import Example
from tests.parity import reference
from tests.parity.batches import DTYPES, agree, quick, tensor
from tests.parity.pairwise import trl_loss
from tests.support.tiny import QUICKSTART

pytestmark = pytest.mark.fast


def scores(seed: int, count: int, scale: float) -> list[NDArray[np.float64]]:
    drawn = np.random.default_rng(seed).normal(0.0, scale, (3, count)).astype(np.float32)
    return list(drawn.astype(np.float64))


@pytest.mark.parametrize("margin", [False, True], ids=["", "margin"])
@pytest.mark.parametrize("center", [None, 0.01], ids=["", "center"])
@quick
@given(st.integers(0, 2**16), st.integers(1, 8), st.sampled_from([0.1, 1.0, 30.0]))
def test_pairwise_loss(center: float | None, margin: bool, seed: int, count: int, scale: float) -> None:
    chosen, rejected, margins = scores(seed, count, scale)
    expected = reference.pairwise_loss(chosen, rejected, margins if margin else None, center)
    for dtype in DTYPES:
        given_margins = tensor(margins, dtype) if margin else None
        agree(trl_loss(tensor(chosen, dtype), tensor(rejected, dtype), given_margins, center), np.array(expected))


def test_gradient() -> None:
    """Against central differences of the formula: -sigmoid(-(r_c - r_r - m)) / B and twice the centring."""
    chosen, rejected, margins = scores(0, 5, 1.0)
    c, r = (tensor(x).requires_grad_() for x in (chosen, rejected))
    trl_loss(c, r, tensor(margins), 0.01).backward()
    for side, expected in (
        (c, reference.slope(lambda x: reference.pairwise_loss(x, rejected, margins, 0.01), chosen)),
        (r, reference.slope(lambda x: reference.pairwise_loss(chosen, x, margins, 0.01), rejected)),
    ):
        assert side.grad is not None
        np.testing.assert_allclose(side.grad.numpy(), expected, rtol=1e-6, atol=1e-9)


PAIRS = [
    Example("How are you?", " Well, thank you for asking.", " Bad.", 0.5),
    Example("Name a colour.", " Red", " I would rather not name one today", 2.0),
    Example("Hi", " Hello there", " Go", 0.0),
]


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """A trainer leaves its device state behind, in this process; later tests make their own."""
    yield
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.usefixtures("no_accelerator")
def test_from_text_to_loss(tmp_path: Path) -> None:
    """Relay's rows through TRL's own collator and trainer: a score is what the head says of the hidden state at the reply's
    EOS, read alone and without padding; the margin is the row's; `center` is the recipe's."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    tok = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tok.pad_token_id,
            num_labels=1,
        )
    )
    nn.init.normal_(model.score.weight, std=2.0)
    rows = [encode.preference(encode.Encoder(tok), pair, 128) for pair in PAIRS]
    assert tok.pad_token_id != tok.eos_token_id
    assert len({len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")}) > 2, "ragged"
    arguments = RewardConfig(
        output_dir=str(tmp_path),
        max_length=None,
        center_rewards_coefficient=0.05,
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        report_to="none",
    )
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tok)
    model.eval()
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        found = float(trainer.compute_loss(model, batch))

        def score(ids: list[int]) -> float:
            assert ids[-1] == tok.eos_token_id
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            return float(hidden.double() @ model.score.weight[0].double())

        sides = [np.array([score(row[side]) for row in rows]) for side in ("chosen_ids", "rejected_ids")]
    margins = np.array([row["margin"] for row in rows])
    assert found == pytest.approx(reference.pairwise_loss(*sides, margins, 0.05), rel=1e-5)
    assert found != pytest.approx(reference.pairwise_loss(*sides, None, 0.05), rel=1e-3)
    assert found != pytest.approx(reference.pairwise_loss(*sides, margins, None), rel=1e-3)
