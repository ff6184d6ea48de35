"""Win rates with paired bootstrap intervals, and what is left of one when length is taken out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RIDGE = 1e-2
"""Weight of the squared coefficients in the fit of `length_controlled`: separable data stay finite, others move little."""
ROUNDS = 25
"""Newton steps of a fit; it converges in a few."""


def win_rate(
    ours: list[float], theirs: list[float], *, draws: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """(share of pairs that `ours` wins, lower and upper end of its 95 % interval); a tie counts one half.

    The interval is the percentile bootstrap over prompts (Efron and Tibshirani 1993, chapter 13).
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    won = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0))
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 1000):
        index = generator.integers(0, len(won), size=(min(1000, draws - start), len(won)))
        means[start : start + len(index)] = won[index].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(won.mean()), float(low), float(high)


def length_controlled(
    won: list[float], longer: list[float], *, draws: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """(share of pairs that would be won at equal length, lower and upper end of its 95 % interval).

    `won` is 1, 0 or one half for a tie, `longer` by how many tokens our reply is longer. As AlpacaEval 2 (Dubois et al. 2024,
    arXiv 2404.04475) fits it for two models: P(win) = sigmoid(a + b tanh(longer / std(longer))), by maximum likelihood with a
    small ridge, of which sigmoid(a) is the rate at equal length. Its third term, how hard each instruction is, needs the
    verdicts of many models and is left out. The interval is the percentile bootstrap over prompts.
    """
    labels, lengths = np.asarray(won, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    spread = lengths.std()
    feature = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(labels), np.full(len(labels), 1.0 / len(labels)), size=draws)
    rates = _rate_at_zero(labels, feature, np.concatenate([np.ones((1, len(labels))), counts]))
    low, high = np.percentile(rates[1:], [2.5, 97.5])
    return float(rates[0]), float(low), float(high)


def _rate_at_zero(labels: Floats, feature: Floats, weights: Floats) -> Floats:
    """sigmoid(a) of the fit with each row of `weights` [fits, N], float64 [fits]: Newton's method on all fits at once."""
    design = np.stack([np.ones_like(feature), feature], 1)
    coefficients = np.zeros((len(weights), 2))
    for _ in range(ROUNDS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(coefficients @ design.T, -30, 30)))
        slope = (weights * (labels - chance)) @ design - RIDGE * coefficients
        bend = np.einsum("fn,ni,nj->fij", weights * chance * (1 - chance), design, design) + RIDGE * np.eye(2)
        coefficients += np.clip(np.linalg.solve(bend, slope[..., None])[..., 0], -4, 4)
    return np.asarray(1.0 / (1.0 + np.exp(-coefficients[:, 0])))
