"""Ensembles by hand."""

from typing import Literal

import pytest
import torch

from pipeline.scoring.ensemble import combine

pytestmark = pytest.mark.fast

# Three members, two responses. Deviations from the means 2 and 4: -1, 0, 1 and -3, 0, 3; over M - 1 = 2: 1 and 3.
SCORES = torch.tensor([[1.0, 7.0], [2.0, 1.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("how", "k", "expected"),
    [
        ("mean", 1.0, [2.0, 4.0]),
        ("min", 1.0, [1.0, 1.0]),
        ("mean_minus_std", 1.0, [1.0, 1.0]),
        ("mean_minus_std", 0.5, [1.5, 2.5]),
        ("mean_minus_std", 0.0, [2.0, 4.0]),
    ],
)
def test_three_members(how: Literal["mean", "min", "mean_minus_std"], k: float, expected: list[float]) -> None:
    torch.testing.assert_close(combine(SCORES, how, k), torch.tensor(expected))


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std"])
def test_one_member_is_itself(how: Literal["mean", "min", "mean_minus_std"]) -> None:
    assert combine(SCORES[:1], how, 2.0).tolist() == [1.0, 7.0]
