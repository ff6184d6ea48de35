"""Autograd through Relay's losses against central differences of the reference formulas, in float64.

The points are kept away from the kinks, where a difference quotient means nothing: a ratio on the clip's edge, an error that
clipping does not change.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.model.likelihood import of_logits, token_log_probs
from stages.ppo.kl import estimate
from stages.ppo.loss import policy_loss, token_weights, value_loss
from tests.parity import reference
from tests.parity.batches import Batch, batches, quick, tensor

pytestmark = pytest.mark.fast
OLD = -1.3


def close(found: Tensor | None, expected: NDArray[np.float64]) -> None:
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def leaf(values: NDArray[np.float64]) -> Tensor:
    return tensor(values).requires_grad_()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "slope"),
    [
        (1.0, 2.0, None, -2.0),  # -A rho inside the clip
        (1.1, -0.7, None, 0.77),
        (1.5, 1.0, None, 0.0),  # clipped: a good token already likelier
        (0.5, -1.0, None, 0.0),  # clipped: a bad token already less likely
        (1.5, -1.0, None, 1.5),  # outside, and still to be brought back
        (0.5, 1.0, None, -0.5),
        (2.9, -1.0, 3.0, 2.9),  # below the second clip
        (3.1, -1.0, 3.0, 0.0),  # beyond it: the loss stays at 3
        (3.1, 1.0, 3.0, 0.0),  # the second clip is for A < 0; the first holds
        (0.5, -1.0, 3.0, 0.0),
    ],
)
def test_policy_gradient(ratio: float, advantage: float, dual: float | None, slope: float) -> None:
    point = np.array([OLD + math.log(ratio)])
    new = leaf(point)
    policy_loss(new, torch.tensor([OLD]).double(), tensor(np.array([advantage])), 0.2, dual)[0].sum().backward()
    close(new.grad, reference.slope(lambda x: reference.policy_loss(float(x[0]), OLD, advantage, 0.2, dual), point))
    assert float(new.grad) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "target", "eps", "slope"),
    [
        (1.1, 2.0, 0.2, -0.9),  # within the clip of the old value 1
        (2.0, 2.5, 0.2, 0.0),  # clipped: nearer to the target than the clip allows
        (0.0, -0.5, 0.2, 0.0),
        (3.0, 0.0, 0.2, 3.0),  # far and wrong: the unclipped error is the larger
        (0.0, 2.0, 0.2, -2.0),
        (2.0, 2.5, None, -0.5),
    ],
)
def test_value_gradient(value: float, target: float, eps: float | None, slope: float) -> None:
    point = np.array([value])
    new = leaf(point)
    value_loss(new, torch.ones(1).double(), tensor(np.array([target])), eps)[0].sum().backward()
    close(new.grad, reference.slope(lambda x: reference.value_loss(float(x[0]), 1.0, target, eps), point))
    assert float(new.grad) == pytest.approx(slope, abs=1e-6)


def off_the_policy_kinks(new: NDArray[np.float64], old: NDArray[np.float64], edges: list[float]) -> NDArray[np.float64]:
    """`new`, moved by 0.001 where its ratio to `old` is within 1e-4 of an edge."""
    near = np.min([np.abs(np.exp(new - old) - edge) for edge in edges], axis=0) < 1e-4
    return new + 1e-3 * near


def mean(batch: Batch, losses: list[reference.Row], aggregation: str) -> float:
    return {"token": reference.token_mean, "sequence": reference.sequence_mean}[aggregation](losses)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("dual", [None, 1.5])
@quick
@given(batches())
def test_minibatch_policy_gradient(dual: float | None, aggregation: str, batch: Batch) -> None:
    """Policy loss and the k3 penalty of GRPO's equation 3, weighed into a mean: the gradient of the whole, and none past
    the responses."""
    old, base, advantages = batch.normal("old", -2.0), batch.normal("reference", -2.0), batch.normal("advantages")
    point = off_the_policy_kinks(old + batch.normal("change", 0.0, 0.4), old, [0.8, 1.2, 1.5])
    new, mask = leaf(point), batch.mask()
    loss = policy_loss(new, tensor(old), tensor(advantages), 0.2, dual)[0]
    loss = loss + batch.coef * estimate(new, tensor(base), "k3")
    weights = token_weights(mask, batch.tokens(), len(mask), float(mask.sum()), aggregation)
    (loss * weights).sum().backward()

    def formula(x: NDArray[np.float64]) -> float:
        rows = zip(*(batch.rows(a) for a in (x, old, base, advantages)), strict=True)
        losses = [
            np.array([reference.policy_loss(*cell, 0.2, dual) for cell in zip(n, o, a, strict=True)])
            + batch.coef * reference.k3(n, b)
            for n, o, b, a in rows
        ]
        return mean(batch, losses, aggregation)

    close(new.grad, reference.slope(formula, point))


@quick
@given(batches())
def test_minibatch_value_gradient(batch: Batch) -> None:
    old, target = batch.normal("old"), batch.normal("returns")
    point = batch.normal("new")
    edge = np.minimum(
        np.abs(np.abs(point - old) - 0.2), np.abs(point + np.clip(point, old - 0.2, old + 0.2) - 2 * target)
    )
    point = point + 1e-3 * (edge < 1e-4)
    new, mask = leaf(point), batch.mask()
    weights = token_weights(mask, batch.tokens(), len(mask), float(mask.sum()), "token")
    (value_loss(new, tensor(old), tensor(target), 0.2)[0] * weights).sum().backward()

    def formula(x: NDArray[np.float64]) -> float:
        rows = zip(*(batch.rows(a) for a in (x, old, target)), strict=True)
        losses = [[reference.value_loss(*cell, 0.2) for cell in zip(*row, strict=True)] for row in rows]
        return mean(batch, [np.array(row) for row in losses], "token")

    close(new.grad, reference.slope(formula, point))


@pytest.mark.parametrize("difference", [-3.0, -0.01, 0.0, 0.01, 3.0])
def test_k3_gradient(difference: float) -> None:
    """1 - q / p: it pulls towards the reference, and is zero where the two agree."""
    point = np.array([OLD])
    new = leaf(point)
    estimate(new, tensor(point + difference), "k3").sum().backward()
    close(new.grad, reference.slope(lambda x: float(reference.k3(x, point + difference)[0]), point))
    assert float(new.grad) == pytest.approx(1.0 - math.exp(difference), abs=1e-6)


def test_k3_in_the_loss_pulls_as_the_forward_kl() -> None:
    """k3 has the mean KL(p || q), yet its gradient, averaged over tokens from p, is that of KL(q || p): the mean of
    (1 - q / p) grad log p is -sum of q grad log p (arXiv 2510.01555). GRPO's choice all the same, and so Relay's."""
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(20), 2)
    logits = leaf(np.log(p))
    log_p = logits.log_softmax(-1)
    (tensor(p) * estimate(log_p, tensor(np.log(q)), "k3")).sum().backward()

    def forward_kl(x: NDArray[np.float64]) -> float:
        return sum(w * (math.log(w) - reference.log_prob(x, i, 1.0)) for i, w in enumerate(q))

    close(logits.grad, reference.slope(forward_kl, np.log(p)))


def test_gradcheck() -> None:
    """PyTorch's own check, over points on all sides of the clips."""
    new = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64) + 1e-3
    for sign in (1.0, -1.0):
        point, old = new.clone().requires_grad_(), torch.zeros(31).double()
        side = torch.full((31,), sign).double()
        assert torch.autograd.gradcheck(lambda x, o=old, a=side: policy_loss(x, o, a, 0.2, 3.0)[0], (point,))
        assert torch.autograd.gradcheck(lambda x, o=old, a=side: value_loss(x, o, 0.3 * a, 0.2)[0], (point,))
        assert torch.autograd.gradcheck(lambda x, o=old: estimate(x, o, "k3"), (point,))


class Head(nn.Identity):
    out_features = 7


class Logits(nn.Module):
    """A language model that answers `logits` [B, L, V], through a head that changes nothing or all at once."""

    def __init__(self, logits: Tensor, *, plain: bool) -> None:
        super().__init__()
        self.logits, self.head = nn.Parameter(logits), Head()
        text = SimpleNamespace(final_logit_softcapping=None if plain else 30.0)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.logits)

    def forward(self, logits_to_keep: int = 0, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[:, -logits_to_keep:])


@pytest.fixture(params=[1.0, 0.7], ids=lambda t: f"temperature {t}")
def temperature(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(params=["whole", "chunks", "model"])
def read(request: pytest.FixtureRequest, temperature: float, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two responses of 3 and 2 tokens after prompts of 2 and 1, as `Roles.log_probs` reads them from given logits: through
    the head at once, two tokens at a time, or through the model's own forward."""
    monkeypatch.setattr("pipeline.model.likelihood.CHUNK_ELEMENTS", 14 if request.param == "chunks" else 2**24)
    from pipeline.model.roles import Role, Roles

    generator = np.random.default_rng(0)
    logits = generator.normal(0.0, 1.0, (2, 5, 7)).astype(np.float32).astype(np.float64)
    tokens = generator.integers(0, 7, (2, 5))
    model = Logits(tensor(logits, torch.float32), plain=request.param != "model")
    roles = Roles({"base": model}, {}, {"policy": Role("base", None, True)})
    arguments = ("policy", torch.tensor(tokens), torch.tensor([2, 1]), torch.tensor([3, 2]), 3, temperature)
    logprobs, entropy = roles("log_probs", *arguments, learn_entropy=True)
    cells = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]  # (row, position that the token after it is read from)
    mask = tensor(np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), torch.float32)
    return SimpleNamespace(
        model=model,
        logits=logits,
        mask=mask,
        kept=mask.bool(),
        logprobs=logprobs,
        entropy=entropy,
        log_prob=lambda z: [reference.log_prob(z[b, t], tokens[b, t + 1], temperature) for b, t in cells],
        spread=lambda z: [reference.entropy(z[b, t], temperature) for b, t in cells],
    )


def test_log_probability_and_its_gradient(read: SimpleNamespace) -> None:
    """Of the softmax at the sampling temperature; float32, as it runs."""
    np.testing.assert_allclose(read.logprobs[read.kept].detach().numpy(), read.log_prob(read.logits), rtol=1e-5)
    (read.logprobs * read.mask).sum().backward()
    expected = reference.slope(lambda z: sum(read.log_prob(z)), read.logits)
    np.testing.assert_allclose(read.model.logits.grad.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_entropy_and_its_gradient(read: SimpleNamespace) -> None:
    np.testing.assert_allclose(read.entropy[read.kept].detach().numpy(), read.spread(read.logits), rtol=1e-5)
    (read.entropy * read.mask).sum().backward()
    expected = reference.slope(lambda z: sum(read.spread(z)), read.logits)
    np.testing.assert_allclose(read.model.logits.grad.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_token_that_may_never_come_leaves_the_entropy_finite() -> None:
    """An added pad's logit is the smallest number there is; below temperature 1 it becomes -inf, which times 0 is NaN."""
    logits = torch.tensor([[1.0, 2.0, torch.finfo(torch.float32).min]])
    _, entropy = of_logits(logits, torch.tensor([0]), 0.5, learn_entropy=False)
    p = 1 / (1 + math.exp(2.0))  # logits 2 and 4 at temperature 0.5
    assert float(entropy) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


@pytest.mark.parametrize("never", [False, True])
@pytest.mark.parametrize("chunk", [11, 2**24])
def test_frozen_head(temperature: float, chunk: int, never: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not train: values and gradients are those of plain autograd in float64; one token at a time too, and
    with a token that may never come."""
    monkeypatch.setattr("pipeline.model.likelihood.CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    head = nn.Linear(5, 11).requires_grad_(False)
    hidden, targets, weights = torch.randn(7, 5, requires_grad=True), torch.randint(0, 10, (7,)), torch.randn(7)
    if never:
        head.register_forward_hook(lambda *arguments: arguments[2].index_fill(-1, torch.tensor([10]), -3e38))
    options: dict[str, Any] = {"learn_entropy": False, "recompute": None, "together": False}
    chosen, entropy = token_log_probs(head, hidden, targets, temperature, **options)
    (chosen * weights).sum().backward()

    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.weight.double().T + head.bias.double()
    known = logits[:, :10] if never else logits
    logprobs = torch.log_softmax(known / temperature, -1)
    picked = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)
    (picked * weights.double()).sum().backward()
    np.testing.assert_allclose(chosen.detach().numpy(), picked.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(entropy.numpy(), -(logprobs.exp() * logprobs).sum(-1).detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(hidden.grad.numpy(), exact.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert not entropy.requires_grad
