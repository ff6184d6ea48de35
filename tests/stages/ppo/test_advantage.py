"""Rewards to advantages: placement of the score, GAE, whitening."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.ppo.advantage import gae, token_rewards, whiten
from stages.ppo.kl import estimate

pytestmark = pytest.mark.fast


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[1.0] * n + [0.0] * (width - n) for n in lengths])


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of five responses of 1 to 9 tokens, with garbage past their ends."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 9, generator=generator)
    return rewards, values, mask_of([9, 1, 4, 8, 2], 9)


def definition(rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float) -> NDArray[np.float64]:
    """GAE as its sum, in float64 and row by row: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    advantages = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].double().numpy(), np.append(values[row, :length].double().numpy(), 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    return advantages


def test_score_is_on_the_last_response_token() -> None:
    kl = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    found = token_rewards(kl, torch.tensor([10.0, 20.0, 30.0]), torch.tensor([3, 2, 1]), 0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.1, -0.2, 9.7], [-0.1, 19.8, 0.0], [29.6, 0.0, 0.0]]))
    assert kl[0, 2] == 3.0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_its_definition(gamma: float, lam: float) -> None:
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = definition(rewards, values, [9, 1, 4, 8, 2], gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns.numpy(), (expected + values.numpy()) * mask.numpy(), rtol=1e-5, atol=1e-5)


def test_what_lies_past_a_response_does_not_count() -> None:
    rewards, values, mask = ragged()
    clean = gae(rewards * mask, values * mask, mask, 0.97, 0.9)
    dirty = gae(rewards * mask + 100 * (1 - mask), values * mask - 50 * (1 - mask), mask, 0.97, 0.9)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert bool((a[mask == 0] == 0).all())


def test_lambda_one_gives_the_reward_to_go() -> None:
    rewards, values, mask = ragged()
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go, rtol=1e-5, atol=1e-5)


def published(tokens: int) -> list[float]:
    """Advantages of `tokens` response tokens, value 0.5 on each, no KL, score 1, lambda 0.95."""
    kl, lengths = torch.zeros(1, tokens), torch.tensor([tokens])
    rewards = token_rewards(kl, torch.tensor([1.0]), lengths, 0.1)
    return [float(a) for a in gae(rewards, torch.full((1, tokens), 0.5), torch.ones(1, tokens), 1.0, 0.95)[0][0]]


def test_published_example_of_score_placement() -> None:
    """Three response tokens: OpenRLHF and verl give 0.451, 0.475, 0.500, TRL 1.12 gives 0.429, 0.451, 0.475.

    TRL adds the score one past EOS, where the value still counts: its numbers are the first three of a reply of four.
    """
    assert published(3) == pytest.approx([0.451, 0.475, 0.500], abs=5e-4)
    assert published(4)[:3] == pytest.approx([0.429, 0.451, 0.475], abs=5e-4)


def test_deepspeed_chat_rewards_advantages_returns(golden: SimpleNamespace) -> None:
    """DeepSpeed-Chat, with its two differences taken away, gives Relay's numbers.

    1. It leaves EOS out of a reply and adds the score one step past it. Relay counts EOS as the last response token and
       adds the score there. The step is the same, once a reply's length is counted with EOS.
    2. It does not whiten: the comparison is before whitening.
    """
    beta, gamma, lam = (golden.raw[name] for name in ("kl_ctl", "gamma", "lam"))
    mask = mask_of(golden.emitted.tolist(), 6)
    rewards = token_rewards(
        beta * estimate(golden.logprobs, golden.reference, "k1") * mask, golden.clipped_scores, golden.emitted, 1.0
    )
    torch.testing.assert_close(rewards, golden.rewards, rtol=0, atol=2e-6)
    advantages, returns = gae(rewards, golden.values, mask, gamma, lam)
    torch.testing.assert_close(advantages, golden.advantages, rtol=0, atol=5e-6)
    torch.testing.assert_close(returns, golden.returns, rtol=0, atol=5e-6)


def test_deepspeed_chat_score_is_one_past_its_own_mask(golden: SimpleNamespace) -> None:
    """The difference itself: by DeepSpeed-Chat's lengths, Relay's score would be a step earlier where a reply ended."""
    ended = golden.lengths < 6
    assert ended.tolist() == [True, False, True]
    steps = torch.tensor(golden.raw["out"]["reward_index"]) - (golden.raw["P"] - 1)
    assert steps.tolist() == (golden.emitted - 1).tolist()
    placed = token_rewards(torch.zeros(3, 6), torch.ones(3), golden.lengths, 0.1).argmax(1)
    assert (steps - placed).tolist() == [1, 0, 1]


def test_whitening_by_hand() -> None:
    """1, 2, 3, 4: mean 5/2, Bessel-corrected variance 5/3."""
    found = whiten(torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, -99.0]]), mask_of([2, 2], 3))
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(5 / 3)
    np.testing.assert_allclose(found[:, :2].flatten().numpy(), expected, rtol=1e-6)
    assert bool((found[:, 2] == 0).all())


def test_whitening_against_numpy() -> None:
    """Centred, and with ddof = 1: neither the uncentred nor the biased form passes."""
    values, _, mask = ragged()
    values = values * 1.6 + 0.66
    kept = mask.bool().numpy()
    x = values.double().numpy()[kept]
    found = whiten(values, mask).numpy()[kept]
    np.testing.assert_allclose(found, (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8), rtol=1e-5, atol=1e-5)
    assert abs(found.mean()) < 1e-6
    assert found.std(ddof=1) == pytest.approx(1.0, abs=1e-5)
    assert np.abs(found - x / x.std(ddof=1)).max() > 0.3
    assert np.abs(found - (x - x.mean()) / x.std(ddof=0)).max() > 0.01


def test_whitening_ignores_shift_scale_and_padding() -> None:
    values, garbage, mask = ragged()
    reference = whiten(values, mask)
    torch.testing.assert_close(whiten(values + 7.0, mask), reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(whiten(values * 3.0, mask), reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(whiten(values * mask + 1000 * garbage * (1 - mask), mask), reference, rtol=0, atol=1e-5)


def test_whitening_is_over_the_whole_batch_and_survives_constants() -> None:
    values = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    found = whiten(values, torch.ones(2, 2))
    assert found[0, 0] < 0 < found[1, 0]
    assert float(found.abs().max()) == pytest.approx(5 / np.sqrt(100 / 3), rel=1e-6)
    assert torch.equal(whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)), torch.zeros(2, 3))
    assert torch.equal(whiten(torch.tensor([[3.0, 8.0]]), torch.tensor([[1.0, 0.0]])), torch.zeros(1, 2))
