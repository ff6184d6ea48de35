"""Win rates and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from stages.evaluate.statistics import win_rate

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("ours", "theirs", "rate"),
    [
        ([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0], 2.5 / 4),  # win, tie, loss, win
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([2.0], [1.0], 1.0),
        ([-1.0, -2.0], [-3.0, 0.0], 0.5),
    ],
)
def test_rate_by_hand(ours: list[float], theirs: list[float], rate: float) -> None:
    found, low, high = win_rate(ours, theirs)
    assert found == rate
    assert low <= rate <= high


def test_intervals_without_spread_are_points() -> None:
    assert win_rate([1.0] * 9, [0.0] * 9) == (1.0, 1.0, 1.0)
    assert win_rate([0.0] * 9, [0.0] * 9) == (0.5, 0.5, 0.5)
    assert win_rate([0.0] * 9, [1.0] * 9) == (0.0, 0.0, 0.0)


def test_sides_are_symmetric() -> None:
    generator = np.random.default_rng(3)
    ours, theirs = generator.integers(0, 4, (2, 200)).astype(float).tolist()
    rate, low, high = win_rate(ours, theirs)
    assert win_rate(theirs, ours) == pytest.approx((1 - rate, 1 - high, 1 - low), abs=0.006)


def pairs(wins: int, losses: int) -> tuple[list[float], list[float]]:
    return [1.0] * wins + [0.0] * losses, [0.5] * (wins + losses)


@pytest.mark.parametrize(("wins", "losses"), [(240, 160), (200, 200), (360, 40)])
def test_interval_is_the_normal_approximation_of_a_binomial(wins: int, losses: int) -> None:
    """Within one win and the bootstrap's own error of p +- 1.96 sqrt(p (1 - p) / n)."""
    count = wins + losses
    p = wins / count
    half = 1.96 * (p * (1 - p) / count) ** 0.5
    assert win_rate(*pairs(wins, losses))[1:] == pytest.approx((p - half, p + half), abs=1 / count + 0.0025)


def test_ties_narrow_the_interval() -> None:
    """Halves have less variance than wins and losses: 200 ties among 400 pairs divide it by two."""
    rate, low, high = win_rate([1.0] * 100 + [0.0] * 100 + [0.5] * 200, [0.5] * 400)
    half = 1.96 * (0.125 / 400) ** 0.5
    assert (rate, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=0.005)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 experiments of 100 pairs with a true rate of 0.6: 95 % of the intervals hold it, give or take 3 errors."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        wins = int(generator.binomial(100, 0.6))
        _, low, high = win_rate(*pairs(wins, 100 - wins), draws=1000, seed=seed)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_the_seed_decides_the_interval() -> None:
    sides = pairs(37, 63)
    assert win_rate(*sides, draws=500, seed=1) == win_rate(*sides, draws=500, seed=1)
    assert len({win_rate(*sides, draws=500, seed=seed) for seed in range(5)}) > 1
    assert win_rate(*sides, draws=1500)[0] == 0.37
