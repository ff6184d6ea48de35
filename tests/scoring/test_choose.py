"""Cuts by threshold and share, and k-center greedy against hand computation and exhaustive search."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from pipeline.config.selection import Cut
from pipeline.scoring.choose import cut, k_center

pytestmark = pytest.mark.fast

SCORES = torch.tensor([0.5, 2.0, -1.0, 2.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("rule", "highest", "expected"),
    [
        ({"threshold": 0.5}, True, [1, 3]),
        ({"threshold": 0.5}, False, [2, 5]),
        ({"keep": 0.5}, True, [0, 1, 3]),  # of the two at 0.5 the first
        ({"keep": 0.5}, False, [0, 2, 5]),
        ({"keep": 0.01}, False, [2]),  # at least one
        ({"keep": 1.0}, True, [0, 1, 2, 3, 4, 5]),
        ({"threshold": 9.0}, True, []),
    ],
)
def test_cut(rule: dict[str, float], highest: bool, expected: list[int]) -> None:
    assert cut(SCORES, Cut(**rule), highest=highest) == expected


def test_a_share_is_rounded_up_from_its_exact_value() -> None:
    assert len(cut(torch.arange(10.0), Cut(keep=0.3), highest=True)) == 3
    assert len(cut(torch.arange(11.0), Cut(keep=0.3), highest=True)) == 4


def test_on_a_line() -> None:
    """0 1 2 10 11 20, mean 44/6: closest to it is 10; then 0 and 20 are 10 off, 0 comes first; then 20; then of 2
    (2 off) and 1 and 11 (1 off) it is 2; 1 and 11 are left."""
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [20.0]])
    cover = k_center(points, 4)
    assert cover.order == [3, 0, 5, 2]
    assert math.isnan(cover.distance[3])
    assert cover.distance[[0, 5, 2]].tolist() == [10.0, 10.0, 2.0]
    assert cover.distance[[1, 4]].tolist() == [1.0, 1.0]
    assert cover.radius == 1.0
    assert k_center(points, 99).order == [3, 0, 5, 2, 1, 4]
    assert k_center(points, 99).radius == 0.0


def test_given_centres_count_and_are_not_chosen_again() -> None:
    """With 0 and 20 given, 10 is 10 from both; then 2, then 1 and 11."""
    points = torch.tensor([[0.0], [20.0], [1.0], [2.0], [10.0], [11.0]])
    cover = k_center(points, 2, given=(0, 1))
    assert cover.order == [4, 3]
    assert cover.distance.tolist() == [0.0, 0.0, 1.0, 2.0, 10.0, 1.0]
    assert k_center(points, 0, given=(0, 1)).radius == 10.0


def test_equal_points_are_taken_last_and_once() -> None:
    points = torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 0.0]])
    assert k_center(points, 2).order == [0, 3]  # the mean is (0.75, 0.75)
    assert k_center(points, 10).order == [0, 3, 1, 2]
    assert k_center(torch.zeros(0, 2), 3).order == []


def test_states_that_differ_by_little_far_from_zero() -> None:
    """At 4096 float32 steps by 2^-11, and x^2 by 2: |x|^2 + |c|^2 - 2xc would see no difference at all."""
    points = torch.tensor([[4096.0], [4096.0 + 2**-9], [4096.0 + 3 * 2**-9]])
    cover = k_center(points, 2)
    assert cover.order == [1, 2]
    assert cover.distance[[0, 2]].tolist() == [2**-9, 2 * 2**-9]


@pytest.mark.parametrize("seed", range(5))
def test_radius_is_at_most_twice_the_smallest(seed: int) -> None:
    """The smallest radius by trying all sets of centres; the farthest-first order by NumPy in float64."""
    points = np.random.default_rng(seed).normal(size=(11, 3)).astype(np.float32)
    apart = np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)
    for count in (1, 2, 3, 4):
        cover = k_center(torch.from_numpy(points), count)
        best = min(apart[:, list(some)].min(1).max() for some in combinations(range(11), count))
        assert cover.radius <= 2 * best + 1e-6
        order = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
        while len(order) < count:
            order.append(int(apart[:, order].min(1).argmax()))
        assert cover.order == order
        assert cover.radius == pytest.approx(apart[:, order].min(1).max(), rel=1e-5)
