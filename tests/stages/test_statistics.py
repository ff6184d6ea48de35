"""Win rates and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from stages.evaluate.statistics import RIDGE, length_controlled, win_rate

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


def test_equal_lengths_leave_the_win_rate() -> None:
    """sigmoid(a) of a fit without lengths is the share; the ridge moves it by less than a thousandth."""
    won = [1.0] * 65 + [0.0] * 30 + [0.5] * 5
    found, low, high = length_controlled(won, [3.0] * 100)
    assert found == pytest.approx(0.675, abs=1e-3)
    error = 1.96 * np.std(won) / 10
    assert (low, high) == pytest.approx((0.675 - error, 0.675 + error), abs=0.02)


def test_preference_for_length_alone_is_no_win() -> None:
    """The longer reply wins as sigmoid(3 tanh(d / std)) says, and ours is longer in four of five."""
    generator = np.random.default_rng(0)
    lengths = generator.normal(8.0, 10.0, 4000)
    won = (generator.random(4000) < 1 / (1 + np.exp(-3 * np.tanh(lengths / lengths.std())))).astype(float)
    assert won.mean() > 0.7
    found, low, high = length_controlled(won.tolist(), lengths.tolist())
    assert found == pytest.approx(0.5, abs=0.05)
    assert low < 0.5 < high


def test_a_known_effect_comes_out() -> None:
    """P(win) = sigmoid(0.8 + 1.5 tanh(d / std)): 0.69 at equal length, inside the interval."""
    generator = np.random.default_rng(1)
    lengths = generator.normal(5.0, 12.0, 4000)
    chance = 1 / (1 + np.exp(-(0.8 + 1.5 * np.tanh(lengths / lengths.std()))))
    won = (generator.random(4000) < chance).astype(float)
    _, low, high = length_controlled(won.tolist(), lengths.tolist())
    assert low < 1 / (1 + np.exp(-0.8)) < high
    assert high - low < 0.06
    assert won.mean() > high  # the plain rate has the length in it


def test_the_fit_is_scikit_learn_s() -> None:
    """Logistic regression with both coefficients penalised, a tie as half a win and half a loss."""
    generator = np.random.default_rng(2)
    lengths = generator.normal(2.0, 5.0, 60)
    won = generator.choice([0.0, 0.5, 1.0], 60)
    feature = np.tanh(lengths / lengths.std())
    rows = np.stack([np.ones(60), feature], 1)
    model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-10, max_iter=10000)
    model.fit(np.concatenate([rows, rows]), [1] * 60 + [0] * 60, np.concatenate([won, 1 - won]))
    expected = 1 / (1 + np.exp(-model.coef_[0, 0]))
    assert length_controlled(won.tolist(), lengths.tolist())[0] == pytest.approx(expected, abs=1e-6)


def test_all_won_stays_finite() -> None:
    found, low, high = length_controlled([1.0] * 20, list(range(20)))
    assert 0.9 < low <= found <= high <= 1.0
