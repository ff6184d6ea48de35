"""Losses without a reference against the papers' formulas in float64 NumPy; partners in KTO's micro-batches by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.preference.loss import Pairs, cpo, orpo, simpo
from stages.preference.reference import partners

CHOSEN, REJECTED = np.array([-3.0, -40.0, -0.75]), np.array([-9.5, -12.0, -66.0])
LENGTHS = np.array([4.0, 16.0, 3.0]), np.array([5.0, 7.0, 30.0])


def pairs(requires_grad: bool = False) -> Pairs:
    sums = [torch.tensor(values, dtype=torch.float32, requires_grad=requires_grad) for values in (CHOSEN, REJECTED)]
    return Pairs(*sums, *(torch.tensor(lengths, dtype=torch.float32) for lengths in LENGTHS))


def softplus(x: np.ndarray) -> np.ndarray:
    """-log sigmoid(-x)."""
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0.0)


def test_simpo() -> None:
    delta = 2.0 * CHOSEN / LENGTHS[0] - 2.0 * REJECTED / LENGTHS[1] - 0.9
    found = simpo(pairs(), beta=2.0, gamma=0.9)
    np.testing.assert_allclose(found.losses.numpy(), softplus(-delta), rtol=1e-6)
    np.testing.assert_allclose(found.chosen.numpy(), 2.0 * CHOSEN / LENGTHS[0], rtol=1e-6)


def test_cpo() -> None:
    wanted = softplus(-0.1 * (CHOSEN - REJECTED)) - 0.7 * CHOSEN / LENGTHS[0]
    np.testing.assert_allclose(cpo(pairs(), beta=0.1, alpha=0.7).losses.numpy(), wanted, rtol=1e-6)


def test_orpo() -> None:
    p_chosen, p_rejected = np.exp(CHOSEN / LENGTHS[0]), np.exp(REJECTED / LENGTHS[1])
    ratio = (p_chosen / (1.0 - p_chosen)) / (p_rejected / (1.0 - p_rejected))
    wanted = -CHOSEN / LENGTHS[0] - 0.3 * np.log(1.0 / (1.0 + 1.0 / ratio))
    np.testing.assert_allclose(orpo(pairs(), beta=0.3).losses.numpy(), wanted, rtol=1e-6)


def test_orpo_of_certain_replies_has_a_gradient() -> None:
    sure = torch.zeros(1, requires_grad=True)
    one = torch.ones(1)
    loss = orpo(Pairs(sure, torch.full((1,), -2.0), one, one), beta=0.3).losses.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("loss", ["simpo", "cpo", "orpo"])
def test_gradients_are_those_of_finite_differences(loss: str) -> None:
    def value(p: Pairs) -> torch.Tensor:
        made = {"simpo": lambda: simpo(p, 2.0, 0.5), "cpo": lambda: cpo(p, 0.1, 1.0), "orpo": lambda: orpo(p, 0.2)}
        return made[loss]().losses

    given = [torch.tensor(v, requires_grad=True) for v in (CHOSEN, REJECTED)]
    fixed = [torch.tensor(v) for v in LENGTHS]
    assert torch.autograd.gradcheck(lambda c, r: value(Pairs(c, r, *fixed)), given)


def test_partners() -> None:
    assert partners(7, 3).tolist() == [2, 0, 1, 5, 3, 4, 5]  # the last row is alone in its batch
    assert partners(4, 2).tolist() == [1, 0, 3, 2]
    assert partners(1, 4).tolist() == [0]
