"""What must hold whatever the numbers: padding does not count, order does not count, units do not count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from stages.ppo.advantage import gae, grpo, reinforce_pp, remax, rloo, token_rewards, whiten
from stages.ppo.kl import estimate
from stages.ppo.loss import policy_loss, token_weights, value_loss
from tests.parity.batches import Batch, batches, groups, one_token, quick, tensor

pytestmark = pytest.mark.fast
Function = Callable[[Batch, Tensor, Tensor, Tensor, Tensor], Tensor]

ESTIMATES: dict[str, Function] = {
    "gae": lambda b, rewards, values, mask, baseline: gae(rewards, values, mask, b.gamma, b.lam)[0],
    "returns": lambda b, rewards, values, mask, baseline: gae(rewards, values, mask, b.gamma, b.lam)[1],
    "grpo": lambda b, rewards, values, mask, baseline: grpo(rewards, mask, b.samples, True),
    "dr_grpo": lambda b, rewards, values, mask, baseline: grpo(rewards, mask, b.samples, False),
    "rloo": lambda b, rewards, values, mask, baseline: rloo(rewards, mask, b.samples),
    "reinforce_pp": lambda b, rewards, values, mask, baseline: reinforce_pp(rewards, mask, b.gamma),
    "remax": lambda b, rewards, values, mask, baseline: remax(rewards, mask, baseline, b.gamma),
    "whiten": lambda b, rewards, values, mask, baseline: whiten(values, mask),
}
"""(batch, rewards, values, mask, greedy scores) to [B, T]."""

named = pytest.mark.parametrize("name", ESTIMATES)


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, mask, greedy scores; rewards on a grid, so that groups may tie."""
    values, baseline = tensor(batch.normal("values")), tensor(batch.scores("greedy"))
    return tensor(batch.steps("rewards")), values, batch.mask(), baseline


def same(found: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=rtol, atol=atol)


@named
@quick
@given(groups, st.integers(1, 3))
def test_padding_changes_nothing(name: str, batch: Batch, columns: int) -> None:
    """Neither columns appended to every row nor what lies past a response."""
    rewards, values, mask, baseline = inputs(batch)
    expected = ESTIMATES[name](batch, rewards * mask, values * mask, mask, baseline)

    def padded(x: Tensor, garbage: float) -> Tensor:
        dirty = torch.where(mask > 0, x, garbage * (1.0 + x))
        return torch.cat([dirty, torch.full((len(x), columns), garbage)], 1)

    wide = torch.cat([mask, torch.zeros(len(mask), columns)], 1)
    found = ESTIMATES[name](batch, padded(rewards, 1e3), padded(values, -1e3), wide, baseline)
    same(found[:, : batch.width], expected)
    assert not found[wide == 0].any()


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@quick
@given(batches(), st.integers(1, 3))
@example(one_token, 2)
def test_padding_changes_no_loss_and_no_gradient(aggregation: str, batch: Batch, columns: int) -> None:
    """There old log-probability, reference, advantage, value and return are 0, as experience leaves them; new ones are not."""
    mask, wide = batch.mask(), torch.cat([batch.mask(), torch.zeros(len(batch.lengths), columns)], 1)
    new, value = tensor(batch.normal("new", -2.0)), tensor(batch.normal("value"))
    old, base, advantages, old_value, returns = (
        tensor(batch.normal(n)) * mask for n in ("old", "reference", "advantages", "values", "returns")
    )

    def learn(mask: Tensor, *given_: Tensor) -> tuple[Tensor, list[Tensor]]:
        new, value, old, base, advantages, old_value, returns = given_
        new, value = new.clone().requires_grad_(), value.clone().requires_grad_()
        loss = policy_loss(new, old, advantages, 0.2, 3.0)[0] + 0.1 * estimate(new, base, "k3")
        loss = loss + value_loss(value, old_value, returns, 0.2)[0]
        total = (loss * token_weights(mask, batch.tokens(), len(mask), float(mask.sum()), aggregation)).sum()
        total.backward()
        return total.detach(), [new.grad, value.grad]

    def more(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full((len(x), columns), fill, dtype=x.dtype)], 1)

    recorded = (old, base, advantages, old_value, returns)
    total, gradients = learn(mask, new, value, *recorded)
    again, wider = learn(wide, more(new, -40.0), more(value, 1e3), *(more(x, 0.0) for x in recorded))
    same(again, total)
    for narrow, found in zip(gradients, wider, strict=True):
        same(found[:, : batch.width], narrow)
        assert not found[wide == 0].any()


@quick
@given(batches())
@example(one_token)
def test_score_is_on_the_last_response_token(batch: Batch) -> None:
    scores = tensor(batch.scores("score"))
    found = token_rewards(torch.zeros(len(scores), batch.width).double(), scores, batch.tokens(), batch.coef)
    last = torch.tensor(batch.lengths) - 1
    assert torch.equal(found[torch.arange(len(scores)), last], scores)
    assert int((found != 0).sum()) <= len(scores)


@pytest.mark.parametrize("name", ["gae", "returns", "reinforce_pp", "remax", "whiten"])
@quick
@given(batches())
def test_rows_may_come_in_any_order(name: str, batch: Batch) -> None:
    given_ = inputs(batch)
    order = torch.tensor(np.random.default_rng(batch.seed).permutation(len(batch.lengths)))
    found = ESTIMATES[name](batch, *(x[order] for x in given_))
    same(found, ESTIMATES[name](batch, *given_)[order])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@quick
@given(groups)
def test_groups_and_their_responses_may_come_in_any_order(name: str, batch: Batch) -> None:
    """Groups among each other, and responses within a group; a response that changes its group does change numbers."""
    given_, generator = inputs(batch), np.random.default_rng(batch.seed)
    places = np.arange(len(batch.lengths)).reshape(-1, batch.samples)
    order = torch.tensor(generator.permuted(generator.permutation(places), axis=1).reshape(-1))
    found = ESTIMATES[name](batch, *(x[order] for x in given_))
    same(found, ESTIMATES[name](batch, *given_)[order])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_groups_are_neighbours(name: str) -> None:
    """Two prompts, two samples each, scores 0, 1 and 5, 9: each is compared with its neighbour, not with the third row."""
    batch = Batch((1, 1, 1, 1), 1, samples=2)
    rewards, one = torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.ones(4, 1)
    found = ESTIMATES[name](batch, rewards, one, one, one[:, 0])[:, 0]
    half = {"grpo": 0.5**0.5, "dr_grpo": 0.5, "rloo": 1.0}[name]
    other = {"grpo": 0.5**0.5, "dr_grpo": 2.0, "rloo": 4.0}[name]
    np.testing.assert_allclose(found.numpy(), [-half, half, -other, other], rtol=2e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@quick
@given(groups)
def test_a_groups_advantages_sum_to_zero(name: str, batch: Batch) -> None:
    """One number a response, the same on all its tokens."""
    found = ESTIMATES[name](batch, *inputs(batch))
    response = found[:, 0]
    same(found, response.unsqueeze(1) * batch.mask())
    same(response.reshape(-1, batch.samples).sum(1), torch.zeros(len(response) // batch.samples).double())


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@quick
@given(groups)
def test_a_prompts_difficulty_does_not_count(name: str, batch: Batch) -> None:
    """A number added to all of a group's scores changes nothing."""
    rewards, values, mask, baseline = inputs(batch)
    shift = tensor(batch.scores("difficulty"))[:: batch.samples].repeat_interleave(batch.samples)
    harder = token_rewards(-rewards * mask, shift, batch.tokens(), 1.0)
    # The spread of a group of equal scores is rounding, which GRPO divides by 1e-4.
    found = ESTIMATES[name](batch, harder, values, mask, baseline)
    same(found, ESTIMATES[name](batch, rewards, values, mask, baseline), 1e-8, 1e-8)


@quick
@given(batches(), st.floats(-100.0, 100.0), st.floats(0.5, 100.0))
def test_whitening_ignores_shift_and_scale(batch: Batch, shift: float, scale: float) -> None:
    """Up to eps; a negative scale turns the sign."""
    values, mask = tensor(batch.normal("values")), batch.mask()
    assume(float(values[mask > 0].std(unbiased=False)) > 0.1)
    expected = whiten(values, mask)
    for sign in (1.0, -1.0):
        found = whiten(sign * scale * values + shift, mask)
        same(found, sign * expected, 0.0, 1e-5)


@quick
@given(batches())
@example(one_token)
def test_whitened_values_have_mean_zero_and_variance_one(batch: Batch) -> None:
    """Over response tokens; variance with n - 1 below. A single token has no variance and becomes 0."""
    mask = batch.mask()
    found = whiten(tensor(batch.normal("values", 0.7, 1.6)), mask)[mask > 0]
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-12)
    if len(found) > 1:
        assert float(found.var()) == pytest.approx(1.0, abs=1e-4)


@quick
@given(groups)
def test_estimators_are_each_others_special_cases(batch: Batch) -> None:
    """RLOO is Dr. GRPO times k / (k - 1); REINFORCE++ is GAE without values and with lambda 1; ReMax is REINFORCE++ less
    the greedy score; GAE's returns with lambda 1 do not depend on the values; with lambda 0 they look one step ahead."""
    rewards, values, mask, baseline = inputs(batch)
    k = batch.samples
    same(rloo(rewards, mask, k), grpo(rewards, mask, k, False) * k / (k - 1))
    to_go = reinforce_pp(rewards, mask, batch.gamma)
    same(to_go, gae(rewards, torch.zeros_like(values), mask, batch.gamma, 1.0)[0])
    same(remax(rewards, mask, baseline, batch.gamma), (to_go - baseline.unsqueeze(1)) * mask)
    same(gae(rewards, values, mask, batch.gamma, 1.0)[1], to_go)
    ahead = torch.cat([(values * mask)[:, 1:], torch.zeros(len(mask), 1).double()], 1)
    same(gae(rewards, values, mask, batch.gamma, 0.0)[1], (rewards + batch.gamma * ahead) * mask)


@quick
@given(batches())
def test_inputs_are_left_as_they_were(batch: Batch) -> None:
    """No function writes into what it is given."""
    given_ = inputs(batch)
    kept = [x.clone() for x in given_]
    grouped = Batch(batch.lengths, batch.width, len(batch.lengths), batch.seed, batch.gamma, batch.lam)
    for name, function in ESTIMATES.items():
        if len(batch.lengths) > 1 or name not in ("grpo", "dr_grpo", "rloo"):
            function(grouped, *given_)
    token_rewards(given_[0], given_[3], batch.tokens(), batch.coef)
    policy_loss(given_[0], given_[1], given_[2], 0.2, 3.0)
    value_loss(given_[0], given_[1], given_[2], 0.2)
    token_weights(given_[2], batch.tokens(), 1, 1.0, "sequence")
    assert all(torch.equal(x, y) for x, y in zip(given_, kept, strict=True))
