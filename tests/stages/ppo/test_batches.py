"""Micro-batches by length: every row once, similar lengths together, ranks with about as much to do, order restored."""

from __future__ import annotations

import pytest
import torch

from stages.ppo.batches import by_length, dealt, restored

pytestmark = pytest.mark.fast
LENGTHS = torch.tensor([3, 9, 4, 9, 1, 8, 2, 7])


def test_longest_first_and_ties_in_row_order() -> None:
    assert [part.tolist() for part in by_length(LENGTHS, 3)] == [[1, 3, 5], [7, 2, 0], [6, 4]]


def test_order_is_restored() -> None:
    index = by_length(LENGTHS, 3)
    pieces = [torch.stack([LENGTHS[part] * 10.0, part.float()], dim=1) for part in index]
    assert restored(pieces, index).tolist() == [[10.0 * n, row] for row, n in enumerate(LENGTHS.tolist())]


@pytest.mark.parametrize(("world", "size"), [(1, 8), (1, 3), (2, 2), (2, 4), (4, 1)])
def test_dealt_to_ranks(world: int, size: int) -> None:
    """Each rank has as many rows; the padded cells of two ranks of two are 2 x 9 + 2 x 4 and 2 x 9 + 2 x 3 by hand."""
    parts = [dealt(LENGTHS, rank, world, size) for rank in range(world)]
    rows = [row for rank in parts for part in rank for row in part.tolist()]
    assert sorted(rows) == list(range(8))
    assert {sum(map(len, rank)) for rank in parts} == {8 // world}
    cells = [sum(len(part) * int(LENGTHS[part].max()) for part in rank) for rank in parts]
    if (world, size) == (2, 2):
        assert cells == [2 * 9 + 2 * 4, 2 * 9 + 2 * 3]
    assert max(cells) - min(cells) <= 2, "a rank waits for the other"
