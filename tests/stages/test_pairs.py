"""Statistics of scored pairs, by hand, in float64, and against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.calibration import calibration_curve

from stages.evaluate import pairs

MARGINS = np.array([2.0, -1.0, 0.5, 0.0, 3.0, -0.25])
LENGTHS = np.array([5.0, 4.0, -3.0, 2.0, 0.0, -1.0])


def test_accuracy_by_hand() -> None:
    """Right: 1 0 1 .5 1 0; longer: 1 1 0 1 .5 0."""
    found = pairs.accuracy(MARGINS, LENGTHS, 0)
    assert found["accuracy"] == pytest.approx(3.5 / 6)
    assert found["longer"] == pytest.approx(3.5 / 6)
    assert found["over_longer"] == pytest.approx(0.0)
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]


def test_intervals_are_those_of_a_proportion() -> None:
    """300 of 400 right: 0.75, standard error sqrt(0.75 0.25 / 400); length tells nothing that correlates."""
    margins = np.array([1.0, 1.0, 1.0, -1.0] * 100)
    lengths = np.array([1.0, -1.0] * 200)
    found = pairs.accuracy(margins, lengths, 0)
    error = norm.ppf(0.975) * np.sqrt(0.75 * 0.25 / 400)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.75 - error, 0.75 + error), abs=0.005)
    difference = np.array([0.0, 1.0, 0.0, 0.0] * 100)  # right minus longer: 1-1, 1-0, 1-1, 0-0
    error = norm.ppf(0.975) * difference.std() / 20
    assert (found["over_longer_low"], found["over_longer_high"]) == pytest.approx(
        (0.25 - error, 0.25 + error), abs=0.005
    )


@pytest.mark.parametrize(("right", "of"), [(300, 400), (1, 7), (0, 5), (12, 12)])
def test_the_interval_of_a_share_is_scipy_s(right: int, of: int) -> None:
    """Wilson's: one that is right in all of 12 pairs is not known to be right always."""
    margins = np.where(np.arange(of) < right, 1.0, -1.0)
    found, expected = pairs.accuracy(margins, margins, 0), binomtest(right, of).proportion_ci(method="wilson")
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((expected.low, expected.high))
    bucket = pairs.by_length(margins, np.zeros(of))[0]
    assert (bucket["accuracy_low"], bucket["accuracy_high"]) == (found["accuracy_low"], found["accuracy_high"])


def test_buckets_by_length() -> None:
    """Ten differences in five buckets of two; the model is right where chosen is longer."""
    lengths = np.arange(-5.0, 5.0)
    found = pairs.by_length(np.where(lengths >= 0, 1.0, -1.0), lengths)
    assert [(bucket["low"], bucket["high"], bucket["pairs"]) for bucket in found] == [
        (-5, -4, 2),
        (-3, -2, 2),
        (-1, 0, 2),
        (1, 2, 2),
        (3, 4, 2),
    ]
    assert [bucket["accuracy"] for bucket in found] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert [bucket["longer"] for bucket in found] == [0.0, 0.0, 0.25, 1.0, 1.0]


def test_pairs_of_equal_difference_stay_together() -> None:
    assert [b["pairs"] for b in pairs.by_length(MARGINS, np.zeros(6))] == [6]
    found = pairs.by_length(np.ones(6), np.array([0.0, 0.0, 0.0, 0.0, 1.0, 2.0]))
    assert sum(bucket["pairs"] for bucket in found) == 6
    assert all(not (a["low"] <= b["low"] <= a["high"]) for a in found for b in found if a is not b)


def test_the_curve_is_scikit_learn_s() -> None:
    """Of the probabilities of the own preference; its ten bins of 0.5 to 1 are the upper ten of twenty."""
    generator = np.random.default_rng(0)
    margins = generator.normal(0.5, 1.5, 500)
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    right, confidence = calibration_curve((margins > 0).astype(int), sure, n_bins=20)
    found = pairs.reliability(margins)
    assert [point["accuracy"] for point in found] == pytest.approx(list(right))
    assert [point["confidence"] for point in found] == pytest.approx(list(confidence))
    assert sum(point["pairs"] for point in found) == 500


def test_the_error_is_that_of_both_orders() -> None:
    """Each pair in both orders: the first is the better one with probability sigmoid(margin), and is it once of two times."""
    margins = np.random.default_rng(2).normal(0.5, 1.5, 500)
    sure = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    first = np.repeat([1.0, 0.0], len(margins))
    bins = np.minimum((20 * sure).astype(int), 19)
    apart = [abs(sure[bins == n].mean() - first[bins == n].mean()) * (bins == n).mean() for n in np.unique(bins)]
    assert pairs.calibration_error(pairs.reliability(margins)) == pytest.approx(sum(apart))


def test_calibration_error_by_hand() -> None:
    """Confidence 0.97 and right in 3 of 4; 0.57 and right in 1 of 2: (4 (0.97 - 0.75) + 2 (0.57 - 0.5)) / 6."""
    sure, unsure = np.log(0.97 / 0.03), np.log(0.57 / 0.43)
    curve = pairs.reliability(np.array([sure, sure, sure, -sure, unsure, -unsure]))
    assert [(point["low"], point["high"], point["pairs"]) for point in curve] == [(0.55, 0.6, 2), (0.95, 1.0, 4)]
    assert pairs.calibration_error(curve) == pytest.approx((4 * 0.22 + 2 * 0.07) / 6)


def test_a_calibrated_model_has_no_error() -> None:
    generator = np.random.default_rng(1)
    margins = generator.normal(0, 2, 20000)
    truth = np.where(generator.random(20000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    assert pairs.calibration_error(pairs.reliability(truth)) < 0.01
    assert pairs.calibration_error(pairs.reliability(3 * truth)) > 0.1  # the same preferences, too sure


def test_agreement_by_hand() -> None:
    """Preferences 1 1 0 0 and 1 0 0 0: agree on 3 of 4; by chance 0.5 0.25 + 0.5 0.75 = 0.5: kappa 0.5."""
    first = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    second = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 3.0]])
    found = pairs.agreement(np.stack([first, second]))
    assert found["agreement"] == 0.75
    assert found["kappa"] == pytest.approx(0.5)
    assert pairs.agreement(np.stack([first, first, first])) == pytest.approx(
        {"agreement": 1, "kappa": 1, "spearman": 1, "margin_std": 0}
    )
    reverse = pairs.agreement(np.stack([first, -first]))
    assert (reverse["agreement"], reverse["spearman"]) == (0.0, pytest.approx(-1.0))


def test_how_far_margins_lie_apart() -> None:
    """Margins 1 and 3, 2 and 2; what a member adds to all its scores is not seen."""
    first, second = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[13.0, 10.0], [12.0, 10.0]])
    assert pairs.agreement(np.stack([first, second]))["margin_std"] == pytest.approx((np.sqrt(2) + 0) / 2)


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_told_of_members_is_left_out() -> None:
    """Where all are always right there is nothing that chance does not explain; one score for all has no order."""
    right = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert pairs.agreement(np.stack([right, right])).keys() == {"agreement", "spearman", "margin_std"}
    assert pairs.agreement(np.stack([right, np.zeros((2, 2))])) == pytest.approx(
        {"agreement": 0, "kappa": 0, "margin_std": (1 + 2) / 2 / np.sqrt(2)}
    )


def test_distribution() -> None:
    found = pairs.distribution(np.arange(101.0))
    assert found == pytest.approx(
        {"mean": 50, "std": np.sqrt((101**2 - 1) / 12), "q05": 5, "q25": 25, "q50": 50, "q75": 75, "q95": 95}
    )
