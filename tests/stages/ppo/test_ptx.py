"""Which rows are mixed into which minibatch, with what weight, on which rank."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.schema import Ptx, Source
from stages.ppo.ptx import Mixture

pytestmark = pytest.mark.fast


def mixture(rows: int = 24, **changed: Any) -> Mixture:
    """Row n has n + 1 prompt tokens and two target tokens."""
    data = [{"input_ids": [7] * (n + 3), "labels": [-100] * (n + 1) + [n, 0]} for n in range(rows)]
    block = Ptx(data=[Source(path="a")], **{"batch": 8, **changed})
    return Mixture(block, data, seed=3, steps=5, pad=0)


@pytest.mark.parametrize(
    ("final", "expected"), [(None, [2.0] * 5), (0.0, [2.0, 1.5, 1.0, 0.5, 0.0]), (4.0, [2.0, 2.5, 3.0, 3.5, 4.0])]
)
def test_weight_goes_from_first_to_last_step(final: float | None, expected: list[float]) -> None:
    mixed = mixture(coef=2.0, final_coef=final)
    assert [mixed.coef(step) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("world", "size", "cut"), [(1, 8, [8]), (2, 8, [4]), (2, 1, [1] * 4), (1, 3, [3, 3, 2]), (4, 1, [1, 1])]
)
def test_minibatches_do_not_depend_on_ranks_and_cuts(world: int, size: int, cut: list[int]) -> None:
    """Every minibatch has the same rows in the same order, `size` at a time; three of them are one pass over the data."""
    mixed, seen = mixture(), []
    for number in range(3):
        rows = []
        for rank in range(world):
            parts, tokens = mixed.parts(number, rank, world, size)
            assert [len(part) for part in parts] == cut
            assert tokens == 16
            rows += [row["labels"][-2] for part in parts for row in part]
        whole = mixed.parts(number, 0, 1, 8)[0][0]
        assert rows == [row["labels"][-2] for row in whole]
        seen += rows
    assert sorted(seen) == list(range(24))


def test_first_token_is_never_a_target() -> None:
    """With the loss on all tokens nothing comes before the first one: 5 tokens give 4 targets."""
    mixed = Mixture(
        Ptx(data=[Source(path="a")], batch=1, loss_on="all"),
        [{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}],
        seed=0,
        steps=1,
        pad=0,
    )
    assert mixed.parts(0, 0, 1, 1)[1] == 4
