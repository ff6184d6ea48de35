"""DeepSpeed's rollout engine as one of Relay's, against the reference engine and plain forwards; and PPO's roles through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from pipeline.config.schema import Sampling
from pipeline.generation import engines, hf, hybrid
from pipeline.generation.rollout import Rollout, keys
from pipeline.model.roles import Role, Roles
from tests.support.tiny import SHAPES, build

pytestmark = pytest.mark.fast

VOCABULARY, PAD, EOS = 97, 0, [1, 5, 9]
PROMPTS = [
    [(17 * row + 7 * column) % 90 + 5 for column in range(length)] for row, length in enumerate([3, 1, 8, 19, 9])
]
SAMPLING = Sampling(engine="deepspeed", temperature=0.7, max_response_length=16)


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def row_keys(rows: int, seed: int = 0) -> Tensor:
    return keys(seed, 0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


def run(
    model: Any,
    noise: Tensor | None,
    sampling: Sampling = SAMPLING,
    *,
    prompts: list[list[int]] = PROMPTS,
    eos: list[int] = EOS,
) -> Rollout:
    return hybrid.sample(model, prompts, noise, sampling, pad=PAD, eos=eos)


def responses(rollout: Rollout) -> list[list[int]]:
    return [rollout.response(row) for row in range(len(rollout.lengths))]


def plain_logprobs(model: Any, rollout: Rollout, row: int, temperature: float) -> Tensor:
    """Log-probabilities [T, V] after each prefix of a row's response, by one forward without padding, mask or cache."""
    start, length = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
    with torch.no_grad():
        logits = model(rollout.tokens[row : row + 1, : start + length], use_cache=False).logits[0, start - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_greedy_rollouts_are_those_of_the_reference_engine(shape: str) -> None:
    """Tokens, lengths, ends and log-probabilities, of prompts of different lengths, when some responses end."""
    model = build(shape)
    eos = [*EOS, responses(run(model, None))[0][3]]
    expected = hf.sample(model, PROMPTS, None, SAMPLING, pad=PAD, eos=eos)
    found = run(model, None, eos=eos)
    assert bool(expected.ended.any())
    for name in ("tokens", "prompt_lengths", "lengths", "ended"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_logprobs_are_those_of_a_plain_forward(model: Any) -> None:
    """At the sampling temperature and before top-k, up to and including the last token; 0 after it."""
    rollout = run(model, row_keys(5), SAMPLING.model_copy(update={"top_k": 20}))
    assert 0 < int(rollout.ended.sum()) < 5, "some responses end and some are truncated"
    for row, response in enumerate(responses(rollout)):
        every = plain_logprobs(model, rollout, row, 0.7)
        expected = every[range(len(response)), response]
        torch.testing.assert_close(rollout.logprobs[row, : len(response)], expected, rtol=0, atol=1e-4)
        assert bool((rollout.logprobs[row, len(response) :] == 0).all())
        assert bool((expected >= every.topk(20).values[:, -1]).all()), "every token is among the 20 likeliest"


def test_responses_end_as_the_tokens_say(model: Any) -> None:
    rollout = run(model, row_keys(5))
    for row, (*body, last) in enumerate(responses(rollout)):
        assert not set(body) & set(EOS)
        assert (last in EOS) == bool(rollout.ended[row])
        assert bool(rollout.ended[row]) or len(body) == 15
    assert rollout.logprobs.shape == (5, int(rollout.lengths.max()))
    (never,) = run(model, row_keys(1), prompts=[PROMPTS[0]], eos=[]).lengths.tolist()
    assert never == 16


def test_a_response_may_hold_the_pad_token(model: Any) -> None:
    """DeepSpeed's own attention mask leaves such tokens out; lengths come from EOS alone."""
    hot = Sampling(temperature=50.0, max_response_length=100)
    rollout = run(model, row_keys(8), hot, prompts=[[20, 31]] * 8, eos=[1])
    held = [row for row, response in enumerate(responses(rollout)) if PAD in response[:-1]]
    assert held
    for row in held:
        response = rollout.response(row)
        expected = plain_logprobs(model, rollout, row, 50.0)[range(len(response)), response]
        torch.testing.assert_close(rollout.logprobs[row, : len(response)], expected, rtol=0, atol=1e-4)


def test_the_keys_decide_the_tokens(model: Any) -> None:
    """Whatever torch's generator has been through, which is left as it was; equal prompts differ."""
    torch.manual_seed(1)
    first = run(model, row_keys(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = run(model, row_keys(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logprobs, again.logprobs)
    other = run(model, row_keys(5, seed=1))
    assert all(a != b for a, b in zip(responses(first), responses(other), strict=True))
    assert len({tuple(r) for r in responses(run(model, row_keys(6), prompts=[PROMPTS[0]] * 6))}) == 6


def test_first_tokens_follow_the_tempered_distribution(model: Any) -> None:
    """Within the sampling error of 4000 draws, after min-p as well."""
    logprobs = plain_logprobs(model, run(model, None, prompts=[[20, 31]]), 0, 3.0)[0].double()
    for min_p in (0.0, 0.6):
        kept = logprobs.exp() * (logprobs >= logprobs.max() + np.log(min_p or 1e-30))
        expected = (kept / kept.sum()).numpy()
        sampling = Sampling(temperature=3.0, max_response_length=1, min_p=min_p)
        found = run(model, row_keys(4000), sampling, prompts=[[20, 31]] * 4000).tokens[:, 2]
        counts = np.bincount(found.numpy(), minlength=VOCABULARY)
        error = np.sqrt(expected * (1 - expected) / 4000)
        assert (np.abs(counts / 4000 - expected) <= 5 * error + 1e-9).all()
        assert (expected > 0).sum() > 1, "more than one token to draw"
        assert ((expected > 0).sum() < VOCABULARY) == (min_p > 0)


def test_the_models_own_wishes_do_not_count(model: Any) -> None:
    expected, kept = run(model, row_keys(5)), model.generation_config
    wishes = GenerationConfig(repetition_penalty=3.0, suppress_tokens=[20, 25], min_p=0.9, eos_token_id=list(range(50)))
    try:
        model.generation_config = wishes
        found = run(model, row_keys(5))
        assert model.generation_config is wishes
    finally:
        model.generation_config = kept
    assert responses(found) == responses(expected)


def test_models_it_cannot_decode_are_told_in_one_line() -> None:
    """What transformers refuses of DeepSpeed's call, it does not refuse of the reference engine's."""
    model = build()
    assert engines.unsupported("deepspeed", model) is None
    model.config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match="repetition_penalty"):
        run(model, None)
    line = engines.unsupported("deepspeed", model)
    assert line is not None
    assert "config sets repetition_penalty" in line
    assert "\n" not in line
    assert engines.unsupported("hf", model) is engines.unsupported("static", model) is None


# PPO's roles.


@pytest.fixture
def roles() -> Any:
    """A policy with an adapter and its reference, the same weights without it."""
    peft = get_peft_model(
        build(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), adapter_name="policy"
    )
    return Roles({"base": peft}, {}, {"policy": Role("base", "policy", True), "reference": Role("base", None, False)})


@pytest.mark.parametrize("merged", [False, True])
def test_roles_sample_through_it(roles: Any, merged: bool) -> None:
    """With the policy's adapter on, two prompts at a time, and log-probabilities that are the training forward's."""
    if merged:
        roles.sample_whole("policy")
    noise, sampling = row_keys(5), SAMPLING.model_copy(update={"batch": 2})
    with roles.evaluating():
        rollout = roles("rollout", "policy", PROMPTS, noise, sampling, pad=PAD, eos=EOS, synced=False)
        asked = (rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.logprobs.shape[1], 0.7)
        ours, theirs = (roles("log_probs", role, *asked)[0] for role in ("policy", "reference"))
        few = roles("rollout", "policy", PROMPTS[2:4], noise[2:4], sampling, pad=PAD, eos=EOS, synced=False)
    torch.testing.assert_close(rollout.logprobs, ours, rtol=0, atol=1e-4)
    assert float((rollout.logprobs - theirs).abs().max()) > 0.1
    assert responses(few) == responses(rollout)[2:4]
    assert not rollout.logprobs.requires_grad


def test_roles_fall_back_in_one_line(roles: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """To the reference engine and its tokens."""

    def sample(engine: str) -> list[list[int]]:
        sampling = SAMPLING.model_copy(update={"engine": engine})
        with roles.evaluating():
            return responses(roles("rollout", "policy", PROMPTS, row_keys(5), sampling, pad=PAD, eos=EOS, synced=False))

    own = sample("deepspeed")
    roles = Roles({"base": roles.trunks["base"]}, {}, roles.roles)
    roles.causal_lm("policy").config.repetition_penalty = 1.5
    fallen = [sample("deepspeed") for _ in range(2)]
    told = capsys.readouterr().out
    assert fallen == [sample("hf")] * 2 != [own] * 2
    assert told.count("\n") == 1
    assert told.startswith(
        "rollouts of policy use Hugging Face's generate: LlamaForCausalLM's config sets repetition_penal"
    )
