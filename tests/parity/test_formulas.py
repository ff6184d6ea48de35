"""Every formula of `stages/ppo` against the papers' (`reference.py`), in both precisions, over ragged random batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stages.ppo.advantage import ESTIMATORS, Given, gae, grpo, reinforce_pp, remax, rloo, token_rewards, whiten
from stages.ppo.kl import Controller, estimate
from stages.ppo.loss import policy_loss, token_weights, value_loss
from tests.parity import reference
from tests.parity.batches import DTYPES, Batch, agree, batches, groups, one_token, quick, tensor
from tests.parity.reference import Row

pytestmark = pytest.mark.fast
one_group = Batch((1, 3), 4, samples=2)


@pytest.mark.parametrize("name", ["k1", "k3"])
@quick
@given(batches())
@example(one_token)
def test_kl(name: str, batch: Batch) -> None:
    policy, base = batch.normal("policy", -2.0), batch.normal("reference", -2.0)
    formula = {"k1": reference.k1, "k3": reference.k3}[name]
    expected = [formula(p, q) for p, q in zip(batch.rows(policy), batch.rows(base), strict=True)]
    for dtype in DTYPES:
        agree(estimate(tensor(policy, dtype), tensor(base, dtype), name) * batch.mask(dtype), batch.padded(expected))


@quick
@given(
    st.floats(0.001, 1.0), st.floats(-5.0, 50.0), st.floats(0.1, 20.0), st.integers(1, 4096), st.integers(5000, 10**5)
)
def test_adaptive_coefficient(coef: float, kl: float, target: float, sequences: int, horizon: int) -> None:
    controller = Controller(coef, target, horizon)
    controller.update(kl, sequences)
    assert controller.coef == pytest.approx(reference.adapted(coef, kl, target, sequences, horizon), rel=1e-12)


@pytest.mark.parametrize("name", ["k1", "k3"])
@quick
@given(batches())
@example(one_token)
def test_token_rewards(name: str, batch: Batch) -> None:
    policy, base, scores = batch.normal("policy", -2.0), batch.normal("reference", -2.0), batch.scores("score")
    formula = {"k1": reference.k1, "k3": reference.k3}[name]
    expected = [
        reference.token_rewards(formula(p, q), score, batch.coef)
        for p, q, score in zip(batch.rows(policy), batch.rows(base), scores, strict=True)
    ]
    for dtype in DTYPES:
        kl = estimate(tensor(policy, dtype), tensor(base, dtype), name) * batch.mask(dtype)
        agree(token_rewards(kl, tensor(scores, dtype), batch.tokens(), batch.coef), batch.padded(expected))


@quick
@given(batches())
@example(one_token)
@example(Batch((9, 1, 5), 9, gamma=0.97, lam=1.0))
def test_gae(batch: Batch) -> None:
    rewards, values = batch.normal("rewards"), batch.normal("values")
    expected = [
        reference.gae(r, v, batch.gamma, batch.lam)
        for r, v in zip(batch.rows(rewards), batch.rows(values), strict=True)
    ]
    for dtype in DTYPES:
        advantages, returns = gae(
            tensor(rewards, dtype), tensor(values, dtype), batch.mask(dtype), batch.gamma, batch.lam
        )
        agree(advantages, batch.padded(expected))
        agree(returns, batch.padded([a + v for a, v in zip(expected, batch.rows(values), strict=True)]))


@quick
@given(batches())
@example(one_token)
def test_whiten(batch: Batch) -> None:
    values = batch.normal("values", 0.7, 1.6)
    for dtype in DTYPES:
        agree(whiten(tensor(values, dtype), batch.mask(dtype)), batch.padded(reference.whiten(batch.rows(values))))


@pytest.mark.parametrize("std", [True, False], ids=["std", "no std"])
@quick
@given(groups)
@example(one_group)
def test_grpo(std: bool, batch: Batch) -> None:
    rewards = batch.steps("rewards")
    totals = np.array([sum(row) for row in batch.rows(rewards)])
    shared = np.concatenate([reference.grpo(group, std) for group in batch.groups(totals)])
    expected = [np.full(n, a) for n, a in zip(batch.lengths, shared, strict=True)]
    for dtype in DTYPES:
        agree(grpo(tensor(rewards, dtype), batch.mask(dtype), batch.samples, std), batch.padded(expected))


def test_grpo_of_equal_responses_is_zero() -> None:
    """All answers right, or all wrong: nothing to learn, and nothing divided by zero."""
    for score in (0.0, 0.3, 1.0):
        for samples in (2, 3, 4, 8):
            found = grpo(torch.full((samples, 1), score), torch.ones(samples, 1), samples, std=True)
            assert float(found.abs().max()) < 1e-3


@quick
@given(groups)
@example(one_group)
def test_rloo(batch: Batch) -> None:
    rewards = batch.normal("rewards")
    totals = np.array([sum(row) for row in batch.rows(rewards)])
    shared = np.concatenate([reference.rloo(group) for group in batch.groups(totals)])
    expected = [np.full(n, a) for n, a in zip(batch.lengths, shared, strict=True)]
    for dtype in DTYPES:
        agree(rloo(tensor(rewards, dtype), batch.mask(dtype), batch.samples), batch.padded(expected))


@quick
@given(batches())
@example(one_token)
def test_reinforce_pp(batch: Batch) -> None:
    rewards = batch.normal("rewards")
    expected = [reference.reward_to_go(row, batch.gamma) for row in batch.rows(rewards)]
    for dtype in DTYPES:
        agree(reinforce_pp(tensor(rewards, dtype), batch.mask(dtype), batch.gamma), batch.padded(expected))


@quick
@given(batches())
@example(one_token)
def test_remax(batch: Batch) -> None:
    rewards, baseline = batch.normal("rewards"), batch.scores("greedy")
    expected = [reference.remax(row, b, batch.gamma) for row, b in zip(batch.rows(rewards), baseline, strict=True)]
    for dtype in DTYPES:
        found = remax(tensor(rewards, dtype), batch.mask(dtype), tensor(baseline, dtype), batch.gamma)
        agree(found, batch.padded(expected))


@pytest.mark.parametrize("name", ESTIMATORS)
@quick
@given(groups, st.booleans())
def test_estimators_by_name(name: str, batch: Batch, group_std: bool) -> None:
    """The recipe's names reach the formulas with the recipe's numbers; only GAE has returns."""
    rewards, values, baseline = batch.normal("rewards"), batch.normal("values"), batch.scores("greedy")
    rows, totals = batch.rows(rewards), np.array([sum(row) for row in batch.rows(rewards)])

    def shared(of_group: Callable[[Row], Row]) -> list[Row]:
        each = np.concatenate([of_group(group) for group in batch.groups(totals)])
        return [np.full(n, a) for n, a in zip(batch.lengths, each, strict=True)]

    expected = {
        "gae": lambda: [
            reference.gae(r, v, batch.gamma, batch.lam) for r, v in zip(rows, batch.rows(values), strict=True)
        ],
        "grpo": lambda: shared(lambda group: reference.grpo(group, group_std)),
        "rloo": lambda: shared(reference.rloo),
        "reinforce_pp": lambda: [reference.reward_to_go(r, batch.gamma) for r in rows],
        "remax": lambda: [reference.remax(r, b, batch.gamma) for r, b in zip(rows, baseline, strict=True)],
    }[name]()
    tensors = tensor(rewards), tensor(values), batch.mask(), tensor(baseline)
    advantages, returns = ESTIMATORS[name].compute(Given(*tensors, batch.samples, batch.gamma, batch.lam, group_std))
    largest = max(1.0, max(float(np.abs(row).max()) for row in expected))
    # A group's deviation may be small: dividing by it magnifies the rounding of the totals.
    np.testing.assert_allclose(advantages.numpy(), batch.padded(expected), rtol=1e-9, atol=1e-10 * largest)
    assert (returns is None) == (name != "gae")


def test_estimators_say_what_their_papers_do() -> None:
    """(critic, responses a prompt needs, greedy response, place of the KL, mean, whitened over the batch)."""
    said = {n: (e.critic, e.samples, e.greedy, e.kl, e.aggregation, e.whiten) for n, e in ESTIMATORS.items()}
    assert said == {
        "gae": (True, 1, False, "reward", "token", True),
        "grpo": (False, 2, False, "loss", "sequence", False),  # arXiv 2402.03300, equations 3 and 4
        "rloo": (False, 2, False, "reward", "token", False),
        "reinforce_pp": (False, 1, False, "reward", "token", True),  # arXiv 2501.03262: KL in r, global normalisation
        "remax": (False, 1, True, "reward", "token", False),
    }


@pytest.mark.parametrize("dual", [None, 1.5, 3.0])
@quick
@given(batches(), st.floats(0.01, 0.9))
@example(one_token, 0.2)
def test_policy_loss(dual: float | None, batch: Batch, eps: float) -> None:
    arrays = batch.normal("new", -2.0, 0.7), batch.normal("old", -2.0, 0.7), batch.normal("advantages")
    cells = list(zip(*(a.flat for a in arrays), strict=True))
    for dtype in DTYPES:
        loss, clipped = policy_loss(*(tensor(a, dtype) for a in arrays), eps, dual)
        agree(loss.flatten(), np.array([reference.policy_loss(*cell, eps, dual) for cell in cells]))
        assert clipped.flatten().tolist() == [float(reference.policy_clipped(*cell, eps)) for cell in cells]


@pytest.mark.parametrize("eps", [None, 0.2, 1.0])
@quick
@given(batches())
@example(one_token)
def test_value_loss(eps: float | None, batch: Batch) -> None:
    arrays = batch.normal("new"), batch.normal("old"), batch.normal("returns")
    cells = list(zip(*(a.flat for a in arrays), strict=True))
    for dtype in DTYPES:
        loss, clipped = value_loss(*(tensor(a, dtype) for a in arrays), eps)
        expected = np.array([reference.value_loss(*cell, eps) for cell in cells])
        agree(loss.flatten(), expected)
        plain = np.array([reference.value_loss(*cell, None) for cell in cells])
        assert clipped.flatten().tolist() == (expected > plain).astype(float).tolist()


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@quick
@given(batches(), st.integers(1, 3))
@example(one_token, 1)
def test_token_weights(aggregation: str, batch: Batch, micro: int) -> None:
    """Weighted losses add up to the mean, however the minibatch is cut into micro-batches."""
    for dtype in DTYPES:
        losses, mask, lengths = batch.normal("losses"), batch.mask(dtype), batch.tokens()
        mean = {"token": reference.token_mean, "sequence": reference.sequence_mean}[aggregation]
        parts = [
            tensor(losses[rows], dtype)
            * token_weights(mask[rows], lengths[rows], len(lengths), float(sum(batch.lengths)), aggregation)
            for rows in (slice(start, start + micro) for start in range(0, len(lengths), micro))
        ]
        agree(torch.cat(parts).sum(), np.array(mean(batch.rows(losses))))
        every = token_weights(mask, lengths, len(lengths), float(sum(batch.lengths)), aggregation)
        agree(every.sum(), np.array(1.0))
