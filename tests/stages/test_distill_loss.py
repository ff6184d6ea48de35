"""The divergences against the paper's formulas, one token and one vocabulary entry at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.distill.loss import divergence, log_probs

Row = NDArray[np.float64]


def softmax(logits: Row, temperature: float) -> Row:
    shifted = np.exp(logits / temperature - max(logits / temperature))
    return np.asarray(shifted / shifted.sum())


def kl(p: Row, q: Row) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def jsd(p: Row, q: Row, beta: float) -> float:
    """Agarwal et al. 2024, arXiv 2306.13649: beta KL(P || beta P + (1 - beta) Q) + (1 - beta) KL(Q || the same)."""
    mixture = np.array([beta * a + (1.0 - beta) * b for a, b in zip(p, q, strict=True)])
    return beta * kl(p, mixture) + (1.0 - beta) * kl(q, mixture)


def logits(seed: int) -> tuple[Row, Row]:
    made = np.random.default_rng(seed)
    return made.normal(size=(7, 11)) * 3.0, made.normal(size=(7, 11)) * 3.0


def ours(teacher: Row, student: Row, beta: float, temperature: float) -> torch.Tensor:
    sides = [log_probs(torch.tensor(side, dtype=torch.float32), 11, temperature) for side in (teacher, student)]
    return divergence(sides[0], sides[1], beta)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd(beta: float, temperature: float) -> None:
    teacher, student = logits(0)
    expected = [
        jsd(softmax(t, temperature), softmax(s, temperature), beta) for t, s in zip(teacher, student, strict=True)
    ]
    torch.testing.assert_close(
        ours(teacher, student, beta, temperature).double(), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_ends_are_the_forward_and_the_reverse_kl(temperature: float) -> None:
    teacher, student = logits(1)
    pairs = [(softmax(t, temperature), softmax(s, temperature)) for t, s in zip(teacher, student, strict=True)]
    for beta, expected in ((0.0, [kl(p, q) for p, q in pairs]), (1.0, [kl(q, p) for p, q in pairs])):
        found = ours(teacher, student, beta, temperature).double()
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_it_tends_to_the_ends() -> None:
    """JSD(beta) / beta -> KL(P || Q) and JSD(beta) / (1 - beta) -> KL(Q || P), in the paper's formula itself."""
    p, q = softmax(logits(2)[0][0], 1.0), softmax(logits(2)[1][0], 1.0)
    assert jsd(p, q, 1e-7) / 1e-7 == pytest.approx(kl(p, q), rel=1e-3)
    assert jsd(p, q, 1.0 - 1e-7) / 1e-7 == pytest.approx(kl(q, p), rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradient(beta: float) -> None:
    """Of the mean over tokens with respect to the student's logits, against central differences of the formula."""
    teacher, student = logits(3)
    temperature, step = 1.5, 1e-5

    def formula(p: Row, q: Row) -> float:
        return kl(p, q) if beta == 0.0 else kl(q, p) if beta == 1.0 else jsd(p, q, beta)

    expected = np.zeros_like(student)
    for row, column in np.ndindex(*student.shape):
        moved = []
        for sign in (1.0, -1.0):
            changed = student[row].copy()
            changed[column] += sign * step
            moved.append(formula(softmax(teacher[row], temperature), softmax(changed, temperature)))
        expected[row, column] = (moved[0] - moved[1]) / (2.0 * step) / len(student)
    given = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    taught = log_probs(torch.tensor(teacher, dtype=torch.float32), 11, temperature)
    divergence(taught, log_probs(given, 11, temperature), beta).mean().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad.double(), torch.tensor(expected), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_an_impossible_token_and_a_wider_head(beta: float) -> None:
    """A token that both models give no probability, as an added pad, and rows of a wider head change nothing."""
    teacher, student = logits(4)
    plain = ours(teacher, student, beta, 0.5)
    sides = []
    for side, more in ((teacher, 3), (student, 1)):
        wide = torch.cat([torch.tensor(side, dtype=torch.float32), torch.full((7, more), 5.0)], dim=1)
        wide[:, 11] = torch.finfo(torch.float32).min
        sides.append(wide.requires_grad_())
    found = divergence(log_probs(sides[0], 12, 0.5), log_probs(sides[1], 12, 0.5), beta)
    torch.testing.assert_close(found, plain)
    found.sum().backward()
    assert sides[1].grad is not None
    assert bool(sides[1].grad.isfinite().all())
