"""DeepSpeed-Chat's own outputs (shared/golden). Where Relay differs on purpose, a test first shows that Relay's way gives
another number, then applies the difference and finds DeepSpeed-Chat's, to 1e-6.

The differences, each with the test that has it:
 1. A reply's length. With pad == eos DeepSpeed-Chat counts EOS as padding, and adds the score one step past the reply,
    which is the step that emits EOS. Relay's pad is never EOS: EOS is a reply's last token, and carries the score.
 2. The score is clipped at 5. Relay clips it only where the recipe has a `score_clip`.
 3. The losses leave out the step that emits EOS; Relay's policy learns to end, and its critic what an ended reply is worth.
 4. Advantages are not whitened. Relay whitens GAE's unless the recipe has `whiten: false`.
 5. A loss is the mean of micro-batches' means; Relay's is the mean over the tokens of the minibatch of all ranks.
 6. The reward model's loss is averaged over every position from the first difference on, padding included, and its scores
    are read before EOS. Relay's loss has one score a text, read at EOS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.ppo.advantage import gae, token_rewards, whiten
from stages.ppo.kl import estimate
from stages.ppo.loss import policy_loss, token_weights, value_loss
from tests.parity import reference
from tests.parity.batches import tensor
from tests.parity.pairwise import trl_loss

pytestmark = pytest.mark.fast
PAD = 2


@dataclass(frozen=True)
class Chat:
    """Its inputs and outputs on the reply part, float64 [3, 6]: step t emits reply token t. `counted` [3] are its lengths,
    without EOS, `mask` is 1 on those tokens; `emitted` [3] are Relay's lengths, with EOS."""

    raw: dict[str, Any]
    mask: Tensor

    def step(self, name: str) -> Tensor:
        return torch.tensor(self.raw[name], dtype=torch.float64)[:, self.raw["P"] - 1 :]

    def out(self, name: str) -> Tensor:
        return torch.tensor(self.raw["out"][name], dtype=torch.float64)

    @property
    def scores(self) -> Tensor:
        return torch.tensor(self.raw["reward"], dtype=torch.float64)

    @property
    def clipped(self) -> Tensor:
        return self.scores.clamp(-self.raw["clip_reward"], self.raw["clip_reward"])

    @property
    def counted(self) -> Tensor:
        return self.mask.sum(1).long()

    @property
    def emitted(self) -> Tensor:
        ids = torch.tensor(self.raw["seq"])[:, self.raw["P"] :]
        return torch.tensor([row.index(PAD) + 1 if PAD in row else len(row) for row in ids.tolist()])

    @property
    def relay_mask(self) -> Tensor:
        return (torch.arange(6) < self.emitted.unsqueeze(1)).double()

    def rewards(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """Relay's, of the tokens that Relay counts."""
        kl = estimate(self.step("logprobs"), self.step("ref_logprobs"), "k1") * self.relay_mask
        return token_rewards(kl, scores, lengths, self.raw["kl_ctl"])

    def advantages(self, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, self.step("values"), mask, self.raw["gamma"], self.raw["lam"])

    def mean(self, losses: Tensor, mask: Tensor, aggregation: str = "token") -> float:
        weights = token_weights(mask, mask.sum(1).long(), len(mask), float(mask.sum()), aggregation)
        return float((losses * weights).sum())


@pytest.fixture
def chat(read_golden: Callable[[str], dict[str, Any]]) -> Chat:
    raw = read_golden("dschat_ppo")
    found = Chat(raw, (torch.tensor(raw["seq"])[:, raw["P"] :] != PAD).double())
    assert found.counted.tolist() == [3, 6, 5], "a reply that ended early, one that never ended, one that ended last"
    assert found.emitted.tolist() == [4, 6, 6]
    return found


def same(found: Tensor, expected: Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)


def differs(found: Tensor, expected: Tensor) -> list[bool]:
    """Per reply."""
    return ((found - expected).abs() > 1e-3).any(1).tolist()


def test_rewards(chat: Chat) -> None:
    """Differences 1 and 2."""
    expected = torch.tensor(chat.raw["out"]["rewards"], dtype=torch.float64)[:, chat.raw["P"] - 1 :]
    # 1. Of a reply's tokens as DeepSpeed-Chat counts them, Relay's score is on the last: a step before, where EOS came.
    assert differs(chat.rewards(chat.clipped, chat.counted), expected) == [True, False, True]
    # 2. Relay without `score_clip`: the first score is 7.5.
    assert differs(chat.rewards(chat.scores, chat.emitted), expected) == [True, False, False]
    same(chat.rewards(chat.clipped, chat.emitted), expected)
    steps = torch.tensor(chat.raw["out"]["reward_index"]) - (chat.raw["P"] - 1)
    assert steps.tolist() == (chat.emitted - 1).tolist()


def test_rewards_on_prompts_are_no_rewards(chat: Chat) -> None:
    """DeepSpeed-Chat computes the KL penalty of prompt tokens too, and never uses it; Relay has reply tokens alone."""
    before = slice(0, chat.raw["P"] - 1)
    logprobs, base = (torch.tensor(chat.raw[n], dtype=torch.float64)[:, before] for n in ("logprobs", "ref_logprobs"))
    expected = torch.tensor(chat.raw["out"]["rewards"], dtype=torch.float64)[:, before]
    same(-chat.raw["kl_ctl"] * estimate(logprobs, base, "k1"), expected)


def test_advantages_and_returns(chat: Chat) -> None:
    """Differences 1, 2 and 4."""
    rewards, mask = chat.rewards(chat.clipped, chat.emitted), chat.relay_mask
    # 1. With the score on the last token before EOS, and EOS outside the mask, all of a reply's advantages are others.
    early, _ = chat.advantages(chat.rewards(chat.clipped, chat.counted), chat.mask)
    assert differs(early, chat.out("advantages")) == [True, False, True]
    # 2. Without the clip, those of the first reply.
    unclipped, _ = chat.advantages(chat.rewards(chat.scores, chat.emitted), mask)
    assert differs(unclipped, chat.out("advantages")) == [True, False, False]
    advantages, returns = chat.advantages(rewards, mask)
    same(advantages, chat.out("advantages"))
    same(returns, chat.out("returns"))
    # 4. Relay's default: centred, scaled by the Bessel-corrected deviation over the 16 tokens of all three replies.
    white = whiten(advantages, mask)
    assert differs(white, chat.out("advantages")) == [True, True, True]
    kept = chat.out("advantages")[mask.bool()]
    same(white[mask.bool()] * (kept.var() + 1e-8).sqrt() + kept.mean(), kept)


@pytest.mark.parametrize(("name", "clip"), [("actor_loss", "cliprange"), ("critic_loss", "cliprange_value")])
def test_losses(chat: Chat, name: str, clip: str) -> None:
    """Differences 3 and 5."""
    if name == "actor_loss":
        new, old, target, loss = "new_logprobs", "logprobs", "advantages", policy_loss
    else:
        new, old, target, loss = "new_values", "values", "returns", value_loss
    losses, clipped = loss(chat.step(new), chat.step(old), chat.out(target), chat.raw[clip])
    assert 0.0 < float((clipped * chat.mask).sum()) < 14.0, "the clip is at work, on some tokens"
    expected = chat.raw["out"][name]
    # 3. Relay's mean is over 16 tokens, two EOS among them.
    assert chat.mean(losses, chat.relay_mask) != pytest.approx(expected, rel=1e-2)
    # 5. One reply to a micro-batch: DeepSpeed-Chat's accumulation weighs replies alike, whatever their length.
    cut = [chat.mean(losses[i : i + 1], chat.mask[i : i + 1]) for i in range(3)]
    assert np.mean(cut) != pytest.approx(expected, rel=1e-2)
    assert np.mean(cut) == pytest.approx(chat.mean(losses, chat.mask, "sequence"), rel=1e-12)
    # Relay's token mean does not depend on the cut: the three parts, weighed by the whole minibatch's tokens.
    weights = token_weights(chat.mask, chat.counted, 3, 14.0, "token")
    assert sum(float((losses[i] * weights[i]).sum()) for i in range(3)) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert chat.mean(losses, chat.mask) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_from_rewards_to_losses(chat: Chat) -> None:
    """Nothing of DeepSpeed-Chat's but its inputs: Relay's whole way, with the differences applied."""
    advantages, returns = chat.advantages(chat.rewards(chat.clipped, chat.emitted), chat.relay_mask)
    policy, _ = policy_loss(chat.step("new_logprobs"), chat.step("logprobs"), advantages, chat.raw["cliprange"])
    value, _ = value_loss(chat.step("new_values"), chat.step("values"), returns, chat.raw["cliprange_value"])
    assert chat.mean(policy, chat.mask) == pytest.approx(chat.raw["out"]["actor_loss"], rel=1e-6, abs=1e-6)
    assert chat.mean(value, chat.mask) == pytest.approx(chat.raw["out"]["critic_loss"], rel=1e-6, abs=1e-6)


@dataclass(frozen=True)
class Pairs:
    """Scores [3, 8] of every token of three chosen and three rejected texts, and where each text's EOS is."""

    raw: dict[str, Any]
    chosen: Tensor
    rejected: Tensor

    def ends(self, side: int) -> list[int]:
        """Index of EOS, the first PAD after the opening one, or of the last token where there is none."""
        rows = self.raw["ids"][side * 3 : side * 3 + 3]
        return [row.index(PAD, 1) if PAD in row[1:] else len(row) - 1 for row in rows]


@pytest.fixture
def pairs(read_golden: Callable[[str], dict[str, Any]]) -> Pairs:
    raw = read_golden("dschat_rm")
    values = torch.tensor(raw["token_rewards"], dtype=torch.float64)
    return Pairs(raw, values[:3], values[3:])


def test_reward_model_loss(pairs: Pairs) -> None:
    """Difference 6."""
    rows, expected = torch.arange(3), pairs.raw["loss"]
    ends = pairs.ends(0), pairs.ends(1)
    assert ends == ([5, 6, 7], [7, 6, 7])
    # Relay: one score a text, at its EOS.
    relay = trl_loss(pairs.chosen[rows, ends[0]], pairs.rejected[rows, ends[1]])
    assert float(relay) != pytest.approx(expected, rel=0.1)
    # DeepSpeed-Chat: the same pairwise loss at each position from the first difference up to the longer text's EOS.
    ids = pairs.raw["ids"]
    found = []
    for i, (start, end) in enumerate(pairs.raw["spans"]):
        first = next((t for t in range(8) if ids[i][t] != ids[i + 3][t]), 7)
        assert start == first
        found.append(float(trl_loss(pairs.chosen[i, start:end], pairs.rejected[i, start:end])))
    # The first pair: padding of the shorter text is in its span.
    assert [ids[0][t] == PAD for t in range(*pairs.raw["spans"][0])] == [False, False, True, True]
    assert found == pytest.approx(pairs.raw["per_pair"], rel=1e-6, abs=1e-6)
    assert np.mean(found) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    spans = [slice(*span) for span in pairs.raw["spans"]]
    by_hand = [
        reference.pairwise_loss(pairs.chosen[i, s].numpy(), pairs.rejected[i, s].numpy()) for i, s in enumerate(spans)
    ]
    assert by_hand == pytest.approx(pairs.raw["per_pair"], rel=1e-6, abs=1e-6)


def test_reward_model_scores(pairs: Pairs) -> None:
    """Difference 6: DeepSpeed-Chat's scores are those of the token before EOS, where there is one; Relay's are EOS's."""
    for values, side, name in ((pairs.chosen, 0, "chosen_end"), (pairs.rejected, 1, "rejected_end")):
        expected, ends = tensor(np.array(pairs.raw[name])), torch.tensor(pairs.ends(side))
        ended = [PAD in row[1:] for row in pairs.raw["ids"][side * 3 : side * 3 + 3]]
        at_eos = values[torch.arange(3), ends]
        assert ((at_eos - expected).abs() > 1e-3).tolist() == ended
        same(values[torch.arange(3), ends - torch.tensor(ended).long()], expected)
