"""KL estimators and the controllers of the coefficient."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.schema import Kl
from stages.ppo.kl import Controller, estimate

pytestmark = pytest.mark.fast


def test_estimators_by_hand() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-2.0, -1.0, -0.5]])
    torch.testing.assert_close(estimate(policy, reference, "k1"), torch.tensor([[1.0, -1.0, 0.0]]))
    # k3 = q/p - 1 - log(q/p): e^-1 - 1 + 1 and e - 1 - 1.
    expected = torch.tensor([[1 / math.e, math.e - 2, 0.0]])
    torch.testing.assert_close(estimate(policy, reference, "k3"), expected)


def test_estimators_against_numpy() -> None:
    generator = np.random.default_rng(0)
    policy, reference = generator.normal(-2, 1, (2, 5, 7))
    difference = reference - policy
    expected = {"k1": policy - reference, "k3": np.exp(difference) - 1 - difference}
    for name, value in expected.items():
        found = estimate(torch.tensor(policy).float(), torch.tensor(reference).float(), name)
        np.testing.assert_allclose(found.numpy(), value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_both_are_unbiased(estimator: str) -> None:
    """Over all tokens of a vocabulary, weighted by the policy, either estimator gives the KL divergence."""
    generator = np.random.default_rng(1)
    p, q = generator.dirichlet(np.ones(50), 2)
    exact = float((p * np.log(p / q)).sum())
    found = estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator).numpy()
    assert float((p * found).sum()) == pytest.approx(exact, abs=1e-9)


def test_k3_is_never_negative_and_keeps_small_differences() -> None:
    """A difference of 1e-4 nats has k3 = 5.0e-9; exp(x) - 1 - x in float32 would return a multiple of 6e-8."""
    policy = torch.full((1, 1), -1.0)
    assert float(estimate(torch.zeros(1, 1), torch.full((1, 1), 1e-4), "k3")) == pytest.approx(5.0e-9, rel=2e-3)
    assert float(estimate(policy, policy, "k3")) == 0.0
    noise = torch.linspace(-3, 3, 601).unsqueeze(0)
    assert bool((estimate(torch.zeros_like(noise), noise, "k3") >= 0).all())


def test_kl_reward_equals_deepspeed_chat(golden: SimpleNamespace) -> None:
    """Tokens before the one that carries the score hold -beta k1 alone."""
    found = -golden.raw["kl_ctl"] * estimate(golden.logprobs, golden.reference, "k1")
    for row, emitted in enumerate(golden.emitted.tolist()):
        torch.testing.assert_close(found[row, : emitted - 1], golden.rewards[row, : emitted - 1], rtol=0, atol=1e-6)


def test_fixed_coefficient_stays() -> None:
    controller = Controller.from_block(Kl(coef=0.07))
    controller.update(1000.0, 512)
    assert controller.coef == 0.07


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 512 / 10000)),  # 10 % above
        (5.4, 0.1 * (1 - 0.1 * 512 / 10000)),
        (60.0, 0.1 * (1 + 0.2 * 512 / 10000)),  # far off: the error is cut at 20 %
        (-3.0, 0.1 * (1 - 0.2 * 512 / 10000)),
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float) -> None:
    controller = Controller.from_block(Kl(coef=0.1, target=6.0, horizon=10000))
    controller.update(kl, 512)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_adaptive_coefficient_depends_on_sequences_not_on_steps() -> None:
    """Ten steps of 64 sequences move it as one step of 640 does, to first order."""
    often, once = Controller(0.1, 6.0, 10000), Controller(0.1, 6.0, 10000)
    for _ in range(10):
        often.update(9.0, 64)
    once.update(9.0, 640)
    assert often.coef == pytest.approx(once.coef, rel=1e-4)
