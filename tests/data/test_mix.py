"""How sources are mixed: rates, draws and rows worked out by hand."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data.mix import apportioned, drawn, labels, rates, spread

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "expected"),
    [
        ([10, 30], [3.0, 1.0], None, [3.0, 1.0]),
        ([10, 30], [None, None], None, None),
        ([10, 30], [None, None], 1.0, [1 / 3, 1.0]),  # by size
        ([16, 81], [None, None], 2.0, [4 / 9, 1.0]),  # square roots 4 and 9
        ([16, 81], [None, None], 4.0, [2 / 3, 1.0]),  # fourth roots 2 and 3
        ([10, 1000], [None, None], 1e9, [1.0, 1.0]),
        ([1000, 10**6], [None, None], 1e-3, [0.0, 1.0]),
        ([0, 4], [None, None], 2.0, [0.0, 1.0]),
    ],
)
def test_rates(
    sizes: list[int], weights: list[float | None], temperature: float | None, expected: list[float] | None
) -> None:
    assert rates(sizes, weights, temperature) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("total", "by", "expected"),
    [
        (40, [3.0, 1.0], [30, 10]),
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),
        # Shares 0.7, 2.8, 3.5: whole 0, 2, 3; the two left go to the remainders 0.8 and 0.7.
        (7, [1.0, 4.0, 5.0], [1, 3, 3]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
        (3, [1.0, 0.0], [3, 0]),
    ],
)
def test_draws_by_largest_remainder(total: int, by: list[float], expected: list[int]) -> None:
    assert apportioned(total, by) == expected


def test_whole_passes_and_a_rest() -> None:
    """Rows 0 to 2 are of source 0 and rows 3 to 6 of source 1; 8 draws of 3 rows are two passes and two rows more."""
    source_of = np.array([0, 0, 0, 1, 1, 1, 1])
    places = drawn(source_of, [8, 2], seed=5)
    often = Counter(places.tolist())
    assert sorted(often[row] for row in range(3)) == [2, 3, 3]
    assert sorted(often[row] for row in range(3, 7)) == [0, 0, 1, 1]
    assert places.tolist() == drawn(source_of, [8, 2], seed=5).tolist()
    assert places.tolist() != drawn(source_of, [8, 2], seed=6).tolist()
    assert places.tolist() != sorted(places.tolist())  # a cut at the end takes of every source


def test_rests_differ_between_seeds() -> None:
    source_of = np.zeros(100, dtype=int)
    assert {*drawn(source_of, [50], seed=0)} != {*drawn(source_of, [50], seed=1)}


def test_every_beginning_is_in_proportion() -> None:
    """Ten of source 0, then five of source 1: of the first 3 k rows k are of source 1, in the order they stand in."""
    order = spread(np.array([0] * 10 + [1] * 5))
    for k in range(1, 6):
        assert sum(order[: 3 * k] >= 10) == k
    assert order[order < 10].tolist() == list(range(10))
    assert spread(np.zeros(4, dtype=int)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Anthropic/hh-rlhf", "data/polite.jsonl.gz"], ["hh-rlhf", "polite"]),
        (["a/train.jsonl", "b/train.jsonl"], ["a-train", "b-train"]),
        (["stage select", "rows.csv"], ["select", "rows"]),
        (["rows.jsonl", "rows.jsonl"], ["rows", "rows-2"]),
        (["data/news/*.jsonl", "data/*.parquet"], ["news", "data"]),
        (["v1.2.json", "v1.3.json"], ["v1.2", "v1.3"]),
    ],
)
def test_names_in_metrics(names: list[str], expected: list[str]) -> None:
    assert labels(names) == expected
