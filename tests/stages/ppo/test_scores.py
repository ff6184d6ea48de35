"""Running normalisation, clip and penalties, by hand and against NumPy over everything seen so far."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.config.schema import Overlong
from stages.ppo.scores import RunningScores, overlong, shaped
from tests.stages.ppo.test_experience import block

pytestmark = pytest.mark.fast


def test_batches_merge_into_one_mean_and_variance() -> None:
    """As if all scores had come at once, also far from zero where the naive sum of squares has no digits left."""
    generator = np.random.default_rng(0)
    seen, running = np.zeros(0), RunningScores()
    for size in (1, 7, 2, 64):
        new = generator.normal(1e4, 0.5, size).astype(np.float32)
        seen = np.concatenate([seen, new.astype(np.float64)])
        running.add(torch.from_numpy(new))
        assert running.count == len(seen)
        assert running.mean == pytest.approx(seen.mean(), rel=1e-12)
        if len(seen) > 1:
            assert running.squares / (running.count - 1) == pytest.approx(seen.var(ddof=1), rel=1e-6)
            expected = (new - seen.mean()) / seen.std(ddof=1)
            np.testing.assert_allclose(running.normalise(torch.from_numpy(new)).numpy(), expected, atol=3e-3)


def test_state_survives_json() -> None:
    running = RunningScores()
    running.add(torch.tensor([0.1, 0.7, -3.0]))
    again = RunningScores(**json.loads(json.dumps(running.state())))
    running.add(torch.tensor([5.0]))
    again.add(torch.tensor([5.0]))
    assert again == running


@pytest.mark.parametrize("scores", [[4.0], [4.0, 4.0, 4.0]], ids=["one", "equal"])
def test_no_spread_is_divided_by_one(scores: list[float]) -> None:
    running = RunningScores()
    running.add(torch.tensor(scores))
    assert running.normalise(torch.tensor([4.0, 6.0])).tolist() == [0.0, 2.0]


def test_overlong_is_the_ramp_of_dapo() -> None:
    """Yu et al. 2025, equation 13, with 20 tokens at most and a buffer of 4: (16 - |y|) / 4 between 16 and 20."""
    lengths = torch.tensor([1, 16, 17, 18, 19, 20])
    assert overlong(lengths, 20, 4).tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]


def test_order_is_normalise_clip_penalties() -> None:
    """Scores 0, 2, 4: mean 2, deviation 2. Clipped at 0.5; no EOS costs 3; a third of the way into the buffer, 10 / 3."""
    running = RunningScores()
    scores = torch.tensor([0.0, 2.0, 4.0])
    running.add(scores)
    settings = block(
        score_clip=0.5,
        missing_eos_penalty=3.0,
        overlong=Overlong(buffer=3, penalty=10.0),
        sampling={"max_response_length": 9},
    )
    found = shaped(scores, torch.tensor([6, 9, 7]), torch.tensor([True, False, True]), settings, running)
    np.testing.assert_allclose(found.numpy(), [-0.5, 0.0 - 3.0 - 10.0, 0.5 - 10.0 / 3.0], atol=1e-6)
