"""How well scores tell the better reply of a pair, and how sure they are of it: pure functions on arrays of N pairs."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, spearmanr
from sklearn.metrics import cohen_kappa_score

from stages.evaluate.measure import Floats, draws, interval

BINS = 10
BUCKETS = 5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def preferred(margins: Floats) -> Floats:
    """1 where the first of a pair is preferred, 0 where the second, one half for a tie; `margins` are first minus second."""
    return np.asarray(np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0)))


def share(right: Floats) -> dict[str, float]:
    """Pairwise accuracy, the mean of `right`, with its 95 % interval: Wilson's (1927), which says something where all pairs are
    right, or few (Brown, Cai and DasGupta 2001)."""
    mean, square = float(right.mean()), float(norm.ppf(0.975)) ** 2 / len(right)
    middle, half = mean + square / 2, math.sqrt(square * (mean * (1 - mean) + square / 4))
    return {
        "accuracy": mean,
        "accuracy_low": (middle - half) / (1 + square),
        "accuracy_high": (middle + half) / (1 + square),
    }


def accuracy(margins: Floats, lengths: Floats, seed: int) -> dict[str, float]:
    """Pairwise accuracy, that of preferring the longer reply, and their difference with its 95 % percentile bootstrap interval
    over pairs. `margins` are scores of chosen minus rejected, `lengths` tokens of chosen minus rejected."""
    right, longer = preferred(margins), preferred(lengths)
    low, high = interval(draws(len(right), seed) @ (right - longer) / len(right))
    over = {"over_longer": float((right - longer).mean()), "over_longer_low": low, "over_longer_high": high}
    return share(right) | {"longer": float(longer.mean())} | over


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
            **share(preferred(margins[inside])),
            "longer": float(preferred(lengths[inside]).mean()),
        }
        for number in np.unique(bucket)
        if (inside := bucket == number).any()
    ]


def reliability(margins: Floats) -> list[dict[str, float]]:
    """How often the preferred reply is the chosen one, by how sure the model is: 1 / (1 + exp(-|margin|)), the probability that
    it gives its own preference, in ten bins of 0.5 to 1 (reliability curve: Guo et al. 2017, arXiv 1706.04599).

    A pair has no first reply. With each pair in both orders the curve of P(first is better) goes from 0 to 1, is the same
    turned about its middle, and has the same error; this is its upper half.
    """
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
    """What members are to each other, from `scores` [members, N, 2] of chosen and rejected: the means over pairs of members of
    `agreement`, the share of pairs on which they prefer the same reply, of `kappa`, Cohen's (1960) of which pairs each gets
    right, so beyond what their accuracies explain (error consistency: Geirhos et al. 2020, arXiv 2006.16736), and of
    `spearman`, the correlation of their scores; `margin_std`, the mean over pairs of the standard deviation of their margins.

    What is not defined, as kappa is not where all are always right, is left out.
    """
    margins = scores[..., 0] - scores[..., 1]
    right = preferred(margins)
    both = list(combinations(range(len(scores)), 2))
    found = {
        "agreement": [np.mean(right[a] == right[b]) for a, b in both],
        "kappa": [_kappa(right[a], right[b]) for a, b in both],
        "spearman": [_spearman(scores[a].ravel(), scores[b].ravel()) for a, b in both],
        "margin_std": margins.std(0, ddof=1),
    }
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {name: value for name, value in means.items() if math.isfinite(value)}


def _kappa(first: Floats, second: Floats) -> float:
    labels: npt.NDArray[np.int64] = (2 * np.stack([first, second])).astype(np.int64)
    return math.nan if (labels == labels[0, 0]).all() else float(cohen_kappa_score(*labels))


def _spearman(first: Floats, second: Floats) -> float:
    return math.nan if np.ptp(first) == 0 or np.ptp(second) == 0 else float(spearmanr(first, second).statistic)
