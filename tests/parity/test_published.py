"""Numbers that shared/notes/peers.md, section 2.4, publishes of the peers' own code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.ppo.advantage import gae, token_rewards, whiten
from tests.parity import reference
from tests.parity.batches import tensor

pytestmark = pytest.mark.fast


def test_score_placement() -> None:
    """Three reply tokens, V = 0.5, score 1, no KL, lambda 0.95. OpenRLHF and verl add the score to the last token, as Relay
    does. TRL 1.12 adds it one past EOS, where the value is still 0.5: its numbers are those of a reply one token longer."""

    def advantages(tokens: int) -> list[float]:
        rewards = token_rewards(torch.zeros(1, 4), torch.ones(1), torch.tensor([tokens]), 0.05)
        mask = (torch.arange(4) < tokens).float().unsqueeze(0)
        return [round(a, 3) for a in gae(rewards, torch.full((1, 4), 0.5), mask, 1.0, 0.95)[0][0].tolist()]

    assert advantages(3) == [0.451, 0.475, 0.500, 0.0]
    assert advantages(4)[:3] == [0.429, 0.451, 0.475]
    by_hand = reference.gae(np.array([0.0, 0.0, 1.0]), np.full(3, 0.5), 1.0, 0.95)
    assert by_hand.tolist() == pytest.approx([0.5 * 0.95**2, 0.5 * 0.95, 0.5], abs=1e-12)


def table() -> reference.Row:
    """Advantages of 25 tokens with the parity run's mean and deviation (its raw GAE: 0.6610 and 1.6098), and with the
    largest and smallest whitened value that its row of differences implies; the notes do not hold the tokens themselves.

    DS-Chat: 1.75 = x - w for the largest x. OpenRLHF: 4.9e-2 = (1.0206 - 1) |w| for the w furthest from zero.
    """
    mean, std = 0.6610, 1.6098
    top = (1.75 - mean) / (std - 1.0)
    bottom = -4.9e-2 / (math.sqrt(25 / 24) - 1.0)
    others = np.linspace(-1.0, 1.0, 23)
    middle = -(top + bottom) / 23
    spread = math.sqrt((24.0 - top**2 - bottom**2 - 23 * middle**2) / float((others**2).sum()))
    white = np.array([top, bottom, *(middle + spread * others)])
    return mean + std * white


def test_whitening_table() -> None:
    """mean, std (n - 1 below) and largest difference from TRL's whitened advantages, row by row."""
    raw = table()
    ours = whiten(tensor(raw).reshape(1, 25), torch.ones(1, 25, dtype=torch.float64)).numpy()[0]
    rows = {
        "TRL and verl": (ours, 0.0, 1.0, 0.0),
        "OpenRLHF, no Bessel": ((raw - raw.mean()) / raw.std(ddof=0), 0.0, 1.0206, 4.9e-2),
        "DS-Chat, raw": (raw, 0.6610, 1.6098, 1.75),
        "torchtune, not centred": (ours + raw.mean(), 0.6610, 1.0, 0.66),
    }
    trl = reference.whiten([raw])[0]
    for name, (values, mean, std, difference) in rows.items():
        assert values.mean() == pytest.approx(mean, abs=5e-5), name
        assert values.std(ddof=1) == pytest.approx(std, abs=5e-5), name
        assert np.abs(values - trl).max() == pytest.approx(difference, abs=5e-3 if difference > 0.1 else 5e-4), name


@pytest.mark.parametrize("count", [2, 25, 640])
def test_bessel_factor(count: int) -> None:
    """OpenRLHF's deviation is sqrt((n - 1) / n) of Relay's, whatever the values: 1.0206 for 25 tokens."""
    raw = np.random.default_rng(count).normal(0.66, 1.6, count)
    ours = whiten(tensor(raw).reshape(1, -1), torch.ones(1, count, dtype=torch.float64)).numpy()[0]
    openrlhf = (raw - raw.mean()) * ((raw - raw.mean()) ** 2).mean() ** -0.5
    np.testing.assert_allclose(openrlhf, ours * math.sqrt(count / (count - 1)), rtol=1e-6)
    assert round(math.sqrt(25 / 24), 4) == 1.0206
