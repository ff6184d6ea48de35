"""Micro-batches by length: every row once, as little padding as a budget of tokens allows, ranks with about as much to do."""

from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.config.schema import Ppo
from stages.ppo import batches
from stages.ppo.batches import by_length, dealt, micro_batch, restored, sizes
from tests.stages.ppo.test_experience import block

pytestmark = pytest.mark.fast
LENGTHS = torch.tensor([300, 900, 400, 900, 100, 800, 200, 700])


def cost(lengths: list[int], cut: tuple[int, ...]) -> int:
    """Tokens computed, padding included, and 32 for each micro-batch of the sizes `cut`."""
    total, first = 0, 0
    for size in cut:
        total += 32 + size * lengths[first]
        first += size
    return total


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [1, 60, 100, 10_000])
def test_no_other_cut_is_cheaper(seed: int, budget: int) -> None:
    """Against all 2^9 ways to cut ten rows."""
    draw = torch.Generator().manual_seed(seed)
    lengths = sorted(torch.randint(1, 50, (10,), generator=draw).tolist(), reverse=True)
    possible = []
    for marks in itertools.product((False, True), repeat=9):
        ends = [0, *(place + 1 for place, mark in enumerate(marks) if mark), 10]
        cut = tuple(b - a for a, b in itertools.pairwise(ends))
        firsts = [lengths[a] for a in ends[:-1]]
        if all(size == 1 or size * first <= budget for size, first in zip(cut, firsts, strict=True)):
            possible.append(cost(lengths, cut))
    found = sizes(lengths, budget)
    assert sum(found) == 10
    assert cost(lengths, tuple(found)) == min(possible)


def test_by_hand() -> None:
    """Padding of 100 tokens costs more than another micro-batch (32), which costs more than none."""
    assert batches.CUT == 32
    assert sizes([900, 900, 800, 700], 10_000) == [2, 1, 1]
    assert sizes([900, 900, 890, 880], 10_000) == [4]
    assert sizes([900, 900, 890, 880], 1800) == [2, 2]
    assert sizes([900, 5], 100) == [1, 1], "a row longer than the budget is one by itself"


def test_longest_first_and_ties_in_row_order() -> None:
    assert [part.tolist() for part in by_length(LENGTHS, 10_000)] == [[1, 3], [5], [7], [2], [0], [6], [4]]


def test_order_is_restored() -> None:
    index = by_length(LENGTHS, 10_000)
    pieces = [torch.stack([LENGTHS[part] * 10.0, part.float()], dim=1) for part in index]
    assert restored(pieces, index).tolist() == [[10.0 * n, row] for row, n in enumerate(LENGTHS.tolist())]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_dealt_to_ranks(world: int) -> None:
    """Each rank has as many rows and as many micro-batches; no rank waits for more than the spread of one round."""
    parts = [dealt(LENGTHS, rank, world, 1800) for rank in range(world)]
    rows = [row for rank in parts for part in rank for row in part.tolist()]
    assert sorted(rows) == list(range(8))
    assert len({tuple(map(len, rank)) for rank in parts}) == 1
    tokens = [int(LENGTHS[torch.cat(rank)].sum()) for rank in parts]
    assert max(tokens) - min(tokens) <= {1: 0, 2: 100, 4: 400}[world]


def test_a_micro_batch_holds_rows_of_full_length() -> None:
    """The recipe's rows x (prompt + response); never more rows than a rank's share of a minibatch."""
    settings: Ppo = block(
        rollout_batch=64, minibatches=2, sampling={"max_prompt_length": 100, "max_response_length": 28}
    )
    assert micro_batch(settings, world=1) == (16, 16 * 128)
    assert micro_batch(settings, world=4) == (8, 8 * 128)
    assert micro_batch(settings.model_copy(update={"micro_batch": 3}), world=1) == (3, 3 * 128)
