"""What a step's metrics say of the sources its prompts are of."""

from __future__ import annotations

import pytest
import torch

from stages.ppo.experience import Experience
from stages.ppo.metrics import describe

pytestmark = pytest.mark.fast


def batch(scores: list[float]) -> Experience:
    """Responses of two tokens to prompts of one."""
    count = len(scores)
    ones, twos = torch.ones(count, dtype=torch.long), torch.full((count,), 2)
    table = torch.zeros(count, 2)
    return Experience(
        tokens=torch.arange(3 * count).view(count, 3),
        prompt_lengths=ones,
        lengths=twos,
        ended=ones.bool(),
        mask=torch.ones(count, 2),
        logprobs=table,
        reference=table,
        values=table,
        kl=table,
        advantages=table,
        returns=table,
        scores=torch.tensor(scores),
    )


def test_scores_on_each_source() -> None:
    found = describe(batch([1.0, 2.0, 6.0, -1.0]), 0.1, critic=False, origins=["a", "b", "b", "a"])
    assert (found["objective/scores"], found["objective/scores_on/a"], found["objective/scores_on/b"]) == (
        2.0,
        0.0,
        4.0,
    )


@pytest.mark.parametrize("origins", [[], ["a", "a"]])
def test_one_source_is_not_told_apart(origins: list[str]) -> None:
    assert not [name for name in describe(batch([1.0, 2.0]), 0.1, critic=False, origins=origins) if "scores_on" in name]
