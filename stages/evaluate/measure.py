"""A number that says how well a policy does something, how it changed between two policies, and what that change means.

Intervals are percentile bootstraps over rows (Efron and Tibshirani 1993, chapter 13); between policies the same rows are drawn
for both, so that what is hard in a row counts for neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Score = Callable[[Floats], Floats]
Verdict = Literal["kept", "lost", "not measurable: at chance before"]

DRAWS = 2000


def ratio(sums: Floats) -> Floats:
    """The first of two sums over the second: a mean, or a loss per token."""
    return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Measure:
    """`rows`, float64 [N, n], is what each row adds; `score` turns sums of rows, [..., n], into the number, [...].

    `chance`, float64 [N, n], is what each row adds for one who guesses; None where nobody can be at chance.
    """

    name: str
    rows: Floats
    score: Score = ratio
    higher_is_better: bool = True
    chance: Floats | None = None

    @property
    def value(self) -> float:
        return float(self.score(self.rows.sum(0)))


def mean(name: str, values: list[float], chance: list[float]) -> Measure:
    """A mean over rows, beside the mean that guessing would give."""
    ones = np.ones(len(values))
    return Measure(name, np.stack([values, ones], 1), chance=np.stack([chance, ones], 1))


@dataclass(frozen=True)
class Change:
    """`value` is after minus before, `low` to `high` its 95 % interval, all in the measure's units."""

    before: float
    after: float
    low: float
    high: float
    verdict: Verdict

    @property
    def value(self) -> float:
        return self.after - self.before


def change(before: Measure, after: Measure, seed: int = 0) -> Change:
    """How a measure differs between two policies on the same rows.

    It is lost when the whole interval is on the worse side, and cannot be lost when what was there before is not better than
    chance (the interval of the difference to it reaches zero); else it is kept.
    """
    drawn = draws(len(before.rows), seed)
    low, high = interval(difference(before, after.rows, before.rows, drawn))
    worse = high < 0 if before.higher_is_better else low > 0
    verdict: Verdict = "lost" if worse else "kept"
    if at_chance(before, drawn):
        verdict = "not measurable: at chance before"
    return Change(before.value, after.value, low, high, verdict)


def at_chance(measure: Measure, drawn: Floats) -> bool:
    """Whether the measure is not surely better than guessing."""
    if measure.chance is None:
        return False
    low, high = interval(difference(measure, measure.rows, measure.chance, drawn))
    return low <= 0 if measure.higher_is_better else high >= 0


def draws(rows: int, seed: int) -> Floats:
    """How often each row is drawn in each bootstrap sample, float64 [DRAWS, rows]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(rows, np.full(rows, 1.0 / rows), size=DRAWS).astype(np.float64)


def difference(measure: Measure, ours: Floats, theirs: Floats, drawn: Floats) -> Floats:
    """The score of `ours` minus that of `theirs` in each sample, float64 [DRAWS]."""
    return measure.score(drawn @ ours) - measure.score(drawn @ theirs)


def interval(samples: Floats) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
