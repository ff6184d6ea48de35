"""Relay's engine behind DeepSpeed's rollout interface, on the sharded model of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.session import Ranks

PROMPTS = [[[20, 31, 42], [50], [7, 8, 60, 61]], [[20, 31, 42]]]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_sharded_rollouts_are_those_of_the_whole_model(ranks: Callable[[int], Ranks], shape: str) -> None:
    """Under ZeRO-3, with three prompts on one rank and one on the other; the same prompt draws other noise on each."""
    first, second = ranks(2).call("tests.distributed.rollout_cases:sharded_and_whole", shape=shape, prompts=PROMPTS)
    assert first["sizes"] == second["sizes"] == [0], "no parameter is whole between forwards"
    assert first["sharded"] == first["whole"]
    assert second["sharded"] == second["whole"]
    assert [row[-12:] for row in first["sharded"][:3]] != [row[-12:] for row in second["sharded"]]
