"""How well scores tell the better reply of a pair, and how sure they are of it: pure functions on arrays of N pairs."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from stages.evaluate.measure import Floats, draws, interval

BINS = 10
BUCKETS = 5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def preferred(margins: Floats) -> Floats:
    """1 where the first of a pair is preferred, 0 where the second, one half for a tie; `margins` are first minus second."""
    return np.asarray(np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0)))


def accuracy(margins: Floats, lengths: Floats, seed: int) -> dict[str, float]:
    """Pairwise accuracy, that of preferring the longer reply, and their difference, with 95 % percentile bootstrap intervals
    over pairs. `margins` are scores of chosen minus rejected, `lengths` tokens of chosen minus rejected."""
    right, longer = preferred(margins), preferred(lengths)
    drawn = draws(len(right), seed) / len(right)
    found = {"accuracy": right.mean(), "longer": longer.mean(), "over_longer": (right - longer).mean()}
    for name, values in (("accuracy", right), ("over_longer", right - longer)):
        found[f"{name}_low"], found[f"{name}_high"] = interval(drawn @ values)
    return {name: float(value) for name, value in found.items()}


def by_length(margins: Floats, lengths: Floats) -> list[dict[str, float]]:
    """Accuracy, and that of preferring the longer reply, where chosen is longer than rejected by `low` to `high` tokens: about
    equally many pairs in each of up to five buckets, pairs of one difference together."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BUCKETS + 1)))
    bucket = np.clip(np.searchsorted(edges, lengths, side="left") - 1, 0, max(len(edges) - 2, 0))
    return [
        {
            "low": float(lengths[inside].min()),
            "high": float(lengths[inside].max()),
            "pairs": float(inside.sum()),
            "accuracy": float(preferred(margins[inside]).mean()),
            "longer": float(preferred(lengths[inside]).mean()),
        }
        for number in np.unique(bucket)
        if (inside := bucket == number).any()
    ]


def reliability(margins: Floats) -> list[dict[str, float]]:
    """How often the preferred reply is the chosen one, by how sure the model is: 1 / (1 + exp(-|margin|)), the probability that
    it gives its own preference, in ten bins of 0.5 to 1 (reliability curve: Guo et al. 2017, arXiv 1706.04599)."""
    sure = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    number = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {
            "low": 0.5 + bin_ / (2 * BINS),
            "high": 0.5 + (bin_ + 1) / (2 * BINS),
            "pairs": float(inside.sum()),
            "confidence": float(sure[inside].mean()),
            "accuracy": float(preferred(margins[inside]).mean()),
        }
        for bin_ in range(BINS)
        if (inside := number == bin_).any()
    ]


def calibration_error(curve: list[dict[str, float]]) -> float:
    """Expected calibration error: the mean distance of accuracy and confidence over the bins, by their pairs (equation 3 of
    Guo et al.)."""
    total = sum(point["pairs"] for point in curve)
    return sum(point["pairs"] * abs(point["accuracy"] - point["confidence"]) for point in curve) / total


def distribution(scores: Floats) -> dict[str, float]:
    """Mean, standard deviation and quantiles of scores."""
    found = {"mean": float(scores.mean()), "std": float(scores.std())}
    return found | {f"q{100 * q:02.0f}": float(np.quantile(scores, q)) for q in QUANTILES}


def agreement(scores: Floats) -> dict[str, float]:
    """Of `scores` [members, N, 2], the means over pairs of members: share of pairs on which they prefer the same reply, Cohen's
    kappa of their preferences (1960), and Spearman's correlation of their scores."""
    prefer = preferred(scores[..., 0] - scores[..., 1])
    both: list[tuple[int, int]] = list(combinations(range(len(scores)), 2))
    found: dict[str, Any] = {
        "agreement": [np.mean(prefer[a] == prefer[b]) for a, b in both],
        "kappa": [cohen_kappa_score(*_labels(prefer[a], prefer[b])) for a, b in both],
        "spearman": [spearmanr(scores[a].ravel(), scores[b].ravel()).statistic for a, b in both],
    }
    return {name: float(np.mean(values)) for name, values in found.items()}


def _labels(first: Floats, second: Floats) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return (2 * first).astype(int), (2 * second).astype(int)
