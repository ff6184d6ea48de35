"""PPO's clipped losses: values and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.ppo.loss import policy_loss, value_loss

pytestmark = pytest.mark.fast


def single(values: NDArray[np.float64]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 1.0, -1.2, 1.0),  # a good token already made likelier: no more to gain
        (1.5, -1.0, 1.5, 0.0),  # a bad token made likelier: the full loss
        (0.5, 1.0, -0.5, 0.0),
        (0.5, -1.0, 0.8, 1.0),
        (1.1, 1.0, -1.1, 0.0),
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: float) -> None:
    old = torch.tensor([[-1.3]])
    found, cut = policy_loss(old + math.log(ratio), old, torch.tensor([[advantage]]), 0.2)
    assert float(found) == pytest.approx(loss, abs=1e-6)
    assert float(cut) == clipped


def test_policy_loss_against_numpy() -> None:
    generator = np.random.default_rng(0)
    new, old, advantages = generator.normal(-1, 0.4, (3, 6, 11))
    ratio = np.exp(new - old)
    expected = np.where(advantages >= 0, -advantages * np.minimum(ratio, 1.3), -advantages * np.maximum(ratio, 0.7))
    outside = np.where(advantages >= 0, ratio > 1.3, ratio < 0.7)
    loss, clipped = policy_loss(single(new), single(old), single(advantages), 0.3)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped.numpy(), outside.astype(np.float32))


def test_policy_gradient_at_ratio_one() -> None:
    """Before any update the gradient is that of REINFORCE: -A grad log p, by hand -A (onehot - softmax) per logit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 9, (4, 5), generator=generator)
    advantages = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    logprobs = torch.log_softmax(logits, -1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    loss, clipped = policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    loss.sum().backward()
    scores = np.exp(logits.detach().numpy())
    softmax = scores / scores.sum(-1, keepdims=True)
    by_hand = -advantages.numpy()[..., None] * (np.eye(9)[tokens.numpy()] - softmax)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), by_hand, rtol=0, atol=1e-12)
    np.testing.assert_allclose(loss.detach().numpy(), -advantages.numpy(), rtol=0, atol=1e-12)
    assert float(clipped.sum()) == 0.0


def test_clipped_tokens_have_no_gradient_and_others_have_all_of_it() -> None:
    """d loss / d logp is -A rho inside the clip and on the pessimistic side, 0 where the clip holds."""
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    logprobs = ratios.log().requires_grad_()
    policy_loss(logprobs, torch.zeros(5), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 3.0, -1.0, 0.0, -2.2]))


@pytest.mark.parametrize(
    ("value", "target", "loss", "clipped"),
    [
        (1.1, 2.0, 0.5 * 0.81, 0.0),  # within the clip of the old value 1
        (2.0, 2.0, 0.5 * 0.64, 1.0),  # on target, but too far from the old value
        (3.0, 0.0, 0.5 * 9.0, 0.0),  # far and wrong: the unclipped error is larger
        (0.0, 2.0, 0.5 * 4.0, 0.0),
        (1.4, 1.1, 0.5 * 0.09, 0.0),  # the clipped value 1.2 is nearer to the target
    ],
)
def test_value_loss_by_hand(value: float, target: float, loss: float, clipped: float) -> None:
    found, cut = value_loss(torch.tensor([[value]]), torch.tensor([[1.0]]), torch.tensor([[target]]), 0.2)
    assert float(found) == pytest.approx(loss, abs=1e-6)
    assert float(cut) == clipped


def test_value_loss_against_numpy() -> None:
    generator = np.random.default_rng(1)
    new, old, target = generator.normal(0, 1, (3, 6, 11))
    near = np.minimum(np.maximum(new, old - 0.2), old + 0.2)
    expected = 0.5 * np.maximum((new - target) ** 2, (near - target) ** 2)
    loss, clipped = value_loss(single(new), single(old), single(target), 0.2)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped.numpy(), (np.abs(near - target) > np.abs(new - target)).astype(np.float32))


def test_value_gradient() -> None:
    """value - return inside the clip and where the unclipped error is the larger, 0 where the clip holds."""
    values = torch.tensor([1.1, 2.0, 3.0], requires_grad=True)
    value_loss(values, torch.ones(3), torch.tensor([2.0, 2.0, 0.0]), 0.2)[0].sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, 3.0]))


def test_deepspeed_chat_losses(golden: SimpleNamespace) -> None:
    """The same losses over DeepSpeed-Chat's mask, which leaves out the step that emits EOS; Relay's mask counts it."""
    mask, raw = golden.mask, golden.raw
    policy, _ = policy_loss(golden.new_logprobs, golden.logprobs, golden.advantages, raw["cliprange"])
    assert float((policy * mask).sum() / mask.sum()) == pytest.approx(raw["out"]["actor_loss"], abs=1e-6)
    value, _ = value_loss(golden.new_values, golden.values, golden.returns, raw["cliprange_value"])
    assert float((value * mask).sum() / mask.sum()) == pytest.approx(raw["out"]["critic_loss"], abs=1e-5)
    assert int(golden.emitted.sum() - mask.sum()) == 2
