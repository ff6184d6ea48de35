"""From what the roles say of a rollout to what the update learns from, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.config.schema import Base, Ppo, Source
from pipeline.generation.rollout import Rollout
from stages.ppo.experience import Experience, Judged, experience
from stages.ppo.scores import shaped

pytestmark = pytest.mark.fast


def block(**changed: Any) -> Ppo:
    return Ppo(
        kind="ppo",
        base=Base(model="base"),
        policy="base",
        reward="reward",
        steps=1,
        lr=1e-5,
        prompts=[Source(path="prompts.jsonl")],
        **changed,
    )


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def judged(golden: SimpleNamespace) -> Judged:
    """DeepSpeed-Chat's batch as Relay sees it: EOS is a response token, nothing is said past a response's end."""
    tokens = torch.tensor(golden.raw["seq"])
    rollout = Rollout(tokens, torch.full((3,), golden.raw["P"]), golden.emitted, golden.logprobs, golden.lengths < 6)
    mask = rollout.mask
    return Judged(rollout, golden.logprobs * mask, golden.reference * mask, golden.values * mask, golden.scores)


def test_deepspeed_chat_batch_end_to_end(golden: SimpleNamespace, judged: Judged) -> None:
    """With whitening off and the score clipped at 5, advantages and returns are DeepSpeed-Chat's."""
    raw = golden.raw
    settings = block(whiten=False, score_clip=raw["clip_reward"], gamma=raw["gamma"], lam=raw["lam"])
    found = experience(judged, settings, raw["kl_ctl"])
    torch.testing.assert_close(found.advantages, golden.advantages, rtol=0, atol=5e-6)
    torch.testing.assert_close(found.returns, golden.returns, rtol=0, atol=5e-6)
    assert torch.equal(found.scores, golden.scores), "raw scores are what is logged"
    assert found.mask.sum(1).tolist() == [4, 6, 6]


def test_whitening_is_the_only_difference_it_makes(golden: SimpleNamespace, judged: Judged) -> None:
    """The same advantages, centred and with Bessel-corrected variance one over all response tokens; same returns."""
    plain, white = (experience(judged, block(whiten=on), 0.1) for on in (False, True))
    kept = plain.mask.bool().numpy()
    x = plain.advantages.double().numpy()[kept]
    np.testing.assert_allclose(white.advantages.numpy()[kept], (x - x.mean()) / x.std(ddof=1), rtol=0, atol=1e-5)
    assert bool((white.advantages[white.mask == 0] == 0).all())
    assert torch.equal(plain.returns, white.returns)


def test_estimator_of_the_recipe_is_used(golden: SimpleNamespace, judged: Judged) -> None:
    found = experience(judged, block(kl={"estimator": "k3"}), 0.1)
    difference = (golden.reference - golden.logprobs).double().numpy() * found.mask.numpy()
    np.testing.assert_allclose(found.kl.numpy(), np.exp(difference) - 1 - difference, rtol=0, atol=1e-6)


def test_scores_are_clipped_before_the_penalty() -> None:
    scores, ended = torch.tensor([7.0, 7.0, -9.0, 1.0]), torch.tensor([True, False, False, False])
    lengths = torch.tensor([3, 3, 3, 3])
    assert shaped(scores, lengths, ended, block()).tolist() == [7.0, 7.0, -9.0, 1.0]
    assert shaped(scores, lengths, ended, block(score_clip=5.0)).tolist() == [5.0, 5.0, -5.0, 1.0]
    assert shaped(scores, lengths, ended, block(score_clip=5.0, missing_eos_penalty=2.0)).tolist() == [
        5.0,
        3.0,
        -7.0,
        -1.0,
    ]


def test_rows_are_cut_to_the_longest_of_them() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    index = torch.tensor([2, 0])
    batch = Experience(
        tokens=torch.arange(21).reshape(3, 7),
        prompt_lengths=torch.tensor([3, 2, 1]),
        lengths=torch.tensor([2, 4, 3]),
        ended=torch.tensor([True, False, True]),
        mask=whole,
        logprobs=whole,
        reference=whole,
        values=whole,
        kl=whole,
        advantages=whole,
        returns=whole,
        scores=torch.tensor([1.0, 2.0, 3.0]),
    )
    rows = batch.rows(index)
    assert torch.equal(rows.tokens, batch.tokens[index, :5])
    assert torch.equal(rows.advantages, whole[index, :3])
    assert rows.scores.tolist() == [3.0, 1.0]
    assert rows.ended.tolist() == [True, True]
    assert rows.lengths.tolist() == [3, 2]


def test_empty_and_endless_responses() -> None:
    """EOS alone is a response of one token, with the score on it; without EOS all tokens count and the penalty applies."""
    rollout = Rollout(
        torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8]]),
        torch.tensor([1, 1]),
        torch.tensor([1, 3]),
        torch.zeros(2, 3),
        torch.tensor([True, False]),
    )
    zeros = torch.zeros(2, 3)
    judged = Judged(rollout, zeros, zeros, zeros, torch.tensor([2.0, 2.0]))
    found = experience(judged, block(whiten=False, missing_eos_penalty=3.0, lam=1.0), 0.1)
    assert found.mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert found.returns.tolist() == [[2, 0, 0], [-1, -1, -1]]
    assert found.not_finite() is None


def test_one_token_in_all_has_no_advantage() -> None:
    """A batch of a single EOS: whitening has nothing to compare with, and gives zero instead of a division by zero."""
    rollout = Rollout(
        torch.tensor([[5, 1]]), torch.tensor([1]), torch.tensor([1]), torch.zeros(1, 1), torch.tensor([True])
    )
    zeros = torch.zeros(1, 1)
    found = experience(Judged(rollout, zeros, zeros, zeros, torch.tensor([2.0])), block(), 0.1)
    assert found.advantages.tolist() == [[0.0]]


@pytest.mark.parametrize("name", ["logprobs", "reference", "values", "scores"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_first_bad_number_is_found(golden: SimpleNamespace, judged: Judged, name: str, value: float) -> None:
    column = getattr(judged, name).clone()
    column[1 if column.dim() == 1 else (1, 0)] = value
    found = experience(replace(judged, **{name: column}), block(), 0.1)
    assert found.not_finite() == (name, 1)
    assert experience(judged, block(), 0.1).not_finite() is None
