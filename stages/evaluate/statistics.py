"""Win rates with paired bootstrap intervals."""

from __future__ import annotations

import numpy as np


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
