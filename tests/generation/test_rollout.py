"""The sampling noise, what a rollout is, and the reference engine on a tiny random model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.schema import Sampling
from pipeline.generation.hf import pack, sample
from pipeline.generation.rollout import Rollout, at_position, keys, pick, truncated

pytestmark = pytest.mark.fast

VOCABULARY, PAD, EOS = 97, 0, [1, 5, 9, 13, 17]
PROMPTS = [[20, 31, 42], [50], [7, 8, 60, 61, 62, 63, 64, 2], [90, 91], [33, 33, 33, 33, 33]]


# The noise.


def lowbias32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Wellons' mixer on 32-bit words, where products wrap by themselves."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def row_keys(rows: int, *, step: int = 0, seed: int = 0) -> Tensor:
    numbers = torch.arange(rows)
    return keys(seed, step, numbers, torch.zeros_like(numbers))


def inverse(probabilities: NDArray[np.float64], keys: Tensor) -> list[int]:
    """The token at which each row's cumulative probability [B, V] first exceeds the row's number in (0, 1)."""
    uniform = (lowbias32(keys.numpy().astype(np.uint32)) + 0.5) / 2.0**32
    cumulative = np.cumsum(probabilities / probabilities.sum(1, keepdims=True), axis=1)
    return [int(np.searchsorted(row, u, side="right")) for row, u in zip(cumulative, uniform, strict=True)]


def test_a_token_is_the_inverse_of_the_distribution_at_the_published_mixer() -> None:
    """Against the mixer in NumPy's uint32 arithmetic and the inverse in float64."""
    words = torch.tensor([0, 1, 2, 12345, 2**31, 2**32 - 1])
    logprobs = torch.log_softmax(torch.randn(6, 50, generator=torch.Generator().manual_seed(4)), -1)
    assert pick(logprobs, words, Sampling()).tolist() == inverse(np.exp(logprobs.double().numpy()), words)
    assert pick(logprobs, None, Sampling()).tolist() == logprobs.numpy().argmax(1).tolist()


def test_no_token_of_probability_zero_is_drawn() -> None:
    """Nor one outside the vocabulary, for NaN; which every key would draw."""
    never = float("-inf")
    logprobs = torch.tensor([[never, 0.0, never], [never, never, 0.0], [0.0, never, never]]).repeat(200, 1)
    assert pick(logprobs, row_keys(600), Sampling()).view(-1, 3).unique(dim=0).tolist() == [[1, 2, 0]]
    assert 0 <= int(pick(torch.full((1, 5), float("nan")), row_keys(1), Sampling())) < 5


def test_keys_are_the_published_mixer() -> None:
    found = keys(7, 3, torch.tensor([0, 11]), torch.tensor([0, 2]))
    key = np.full(2, 7, dtype=np.uint32)
    for part in ([3, 3], [0, 11], [0, 2]):
        key = lowbias32(key ^ lowbias32(np.array(part, dtype=np.uint32) + np.uint32(0x85EBCA6B)))
    assert found.tolist() == key.tolist()


def test_a_token_is_a_function_of_key_and_distribution() -> None:
    """Not of the batch's order or size, of tokens of probability zero behind, the call's number or torch's generator."""
    rows = row_keys(64)
    logprobs = torch.log_softmax(torch.randn(64, 50, generator=torch.Generator().manual_seed(5)), -1)
    whole = pick(logprobs, rows, Sampling())
    torch.manual_seed(123)
    order = torch.randperm(64)
    assert torch.equal(pick(logprobs[order], rows[order], Sampling()), whole[order])
    assert torch.equal(torch.cat([pick(logprobs[[i]], rows[[i]], Sampling()) for i in range(64)]), whole)
    wider = torch.nn.functional.pad(logprobs, (0, 20), value=float("-inf"))
    assert torch.equal(pick(wider, rows, Sampling()), whole)
    assert len(torch.unique(whole)) > 20


def chi_square(counts: NDArray[Any], expected: NDArray[Any]) -> float:
    """Pearson's statistic of counts against probabilities."""
    wanted = expected * counts.sum()
    return float(((counts - wanted) ** 2 / wanted).sum())


def limit(freedom: int) -> float:
    """The 99.99 % point of a chi-square distribution (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("step", [0, 1])
def test_tokens_follow_the_softmax(step: int) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 1.5
    rows = torch.log_softmax(logits, -1).expand(20000, -1)
    drawn = pick(rows, at_position(row_keys(20000, step=step), 3), Sampling())
    probabilities = torch.softmax(logits.double(), -1).numpy()
    counts = np.bincount(drawn.numpy(), minlength=VOCABULARY)
    assert chi_square(counts, probabilities) < limit(VOCABULARY - 1)


@pytest.mark.parametrize("other", ["position", "sample", "prompt", "step", "seed"])
def test_neighbours_are_independent(other: str) -> None:
    """Tokens drawn for neighbours in each coordinate fill the 10 x 10 table as independent draws would."""
    zero, numbers = torch.zeros(20000, dtype=torch.int64), torch.arange(20000)
    first = at_position(keys(0, 0, numbers, zero), 0)
    second = {
        "position": at_position(keys(0, 0, numbers, zero), 1),
        "sample": at_position(keys(0, 0, numbers, zero + 1), 0),
        "prompt": at_position(keys(0, 0, numbers + 1, zero), 0),
        "step": at_position(keys(0, 1, numbers, zero), 0),
        "seed": at_position(keys(1, 0, numbers, zero), 0),
    }[other]
    logits = torch.randn(10, generator=torch.Generator().manual_seed(2)) * 0.5
    drawn = [pick(torch.log_softmax(logits, -1).expand(20000, -1), k, Sampling()).numpy() for k in (first, second)]
    probabilities = torch.softmax(logits.double(), -1).numpy()
    counts = np.bincount(drawn[0] * 10 + drawn[1], minlength=100)
    assert chi_square(counts, np.outer(probabilities, probabilities).ravel()) < limit(99)


def test_keys_do_not_repeat() -> None:
    """Over 2 seeds x 4 steps x 64 prompts x 4 samples x 16 positions."""
    prompts = torch.arange(64).repeat_interleave(4)
    samples = torch.arange(4).repeat(64)
    found = torch.cat(
        [
            at_position(keys(seed, step, prompts, samples), position)
            for seed in range(2)
            for step in range(4)
            for position in range(16)
        ]
    )
    assert len(torch.unique(found)) == len(found) == 32768
    assert int(found.min()) >= 0
    assert int(found.max()) < 2**32


def test_keys_of_one_step_never_repeat() -> None:
    """For one sample number and one position the key is a bijection of the prompt's number: none at any size."""
    found = at_position(row_keys(300_000, step=5), 7)
    assert len(torch.unique(found)) == 300_000


def test_repeats_at_scale_are_those_of_chance() -> None:
    """Among 2^20 keys of 32 bits about 128 pairs coincide by chance; more would be structure in the mixer."""
    rows = torch.cat([row_keys(1024, step=step) for step in range(32)])
    found = torch.cat([at_position(rows, position) for position in range(32)])
    assert len(found) - len(torch.unique(found)) < 128 + 6 * 128**0.5


# What a rollout is.


def test_pack_cuts_after_the_first_eos() -> None:
    prompts = [[20, 21, 22], [30], [40, 41]]
    responses = torch.tensor([[50, 5, 60, 9], [51, 52, 53, 54], [1, 0, 0, 0]])
    logprobs = -torch.arange(1.0, 13.0).reshape(3, 4)
    rollout = pack(prompts, responses, logprobs, EOS, PAD)
    assert rollout.tokens.tolist() == [[20, 21, 22, 50, 5], [30, 51, 52, 53, 54], [40, 41, 1, 0, 0]]
    assert rollout.prompt_lengths.tolist() == [3, 1, 2]
    assert rollout.lengths.tolist() == [2, 4, 1], "EOS counts; a truncated reply has all its tokens"
    assert rollout.ended.tolist() == [True, False, True]
    assert rollout.logprobs.tolist() == [[-1, -2, 0, 0], [-5, -6, -7, -8], [-9, 0, 0, 0]]
    assert rollout.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert [rollout.response(row) for row in range(3)] == [[50, 5], [51, 52, 53, 54], [1]]
    assert rollout.tokens.dtype == rollout.lengths.dtype == rollout.prompt_lengths.dtype == torch.int64


def test_mask_comes_from_lengths_and_not_from_tokens() -> None:
    """A reply may hold the pad token's id."""
    rollout = Rollout(
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        prompt_lengths=torch.tensor([1, 1]),
        lengths=torch.tensor([3, 1]),
        logprobs=torch.zeros(2, 3),
        ended=torch.tensor([False, True]),
    )
    assert rollout.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert rollout.mask.dtype == torch.float32
    assert pack([[3]], torch.tensor([[0, 0, 4]]), torch.zeros(1, 3), EOS, PAD).lengths.tolist() == [3]


# Truncation of the distribution.


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (5, 1.0, 0.0),
        (1, 1.0, 0.0),
        (500, 1.0, 0.0),
        (0, 0.8, 0.0),
        (0, 0.01, 0.0),
        (20, 0.5, 0.0),
        (3, 0.99, 0.0),
        (0, 1.0, 0.1),
        (0, 1.0, 0.99),
        (20, 0.9, 0.2),
    ],
)
def test_truncated_against_numpy(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    logprobs = torch.log_softmax(logits, -1)
    expected = logprobs.double().numpy().copy()
    for row in expected:
        order = np.argsort(-row)
        kept = order[: top_k or VOCABULARY]
        share = np.exp(row[kept]) / np.exp(row[kept]).sum()
        enough = 1 + int(np.searchsorted(np.cumsum(share), top_p)) if top_p < 1 else len(kept)
        row[np.setdiff1d(order, kept[:enough])] = -np.inf
        row[np.exp(row) < min_p * np.exp(row).max()] = -np.inf
    found = truncated(logprobs, Sampling(top_k=top_k, top_p=top_p, min_p=min_p))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert bool(found.isfinite().any(1).all())


# The reference engine.


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama of two layers whose next-token distribution is far from flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        pad_token_id=PAD,
        eos_token_id=EOS[0],
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


SAMPLING = Sampling(temperature=0.7, top_k=20, max_response_length=16)


def run(model: Any, prompts: list[list[int]], noise: Tensor | None, sampling: Sampling = SAMPLING) -> Rollout:
    return sample(model, prompts, noise, sampling, pad=PAD, eos=EOS)


def plain_logprobs(model: Any, rollout: Rollout, row: int, temperature: float) -> Tensor:
    """Log-probabilities [T] of a row's reply by one forward without padding, mask or cache."""
    start, length = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
    tokens = rollout.tokens[row, : start + length]
    with torch.no_grad():
        logits = model(tokens.unsqueeze(0), use_cache=False).logits[0, start - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, -1).gather(1, tokens[start:].unsqueeze(1)).squeeze(1)


def test_the_batch_covers_what_is_tested(model: Any) -> None:
    rollout = run(model, PROMPTS, row_keys(5))
    assert 0 < int(rollout.ended.sum()) < 5, "some replies end and some are truncated"
    assert rollout.lengths[~rollout.ended].unique().tolist() == [16]
    for row in torch.nonzero(rollout.ended).flatten().tolist():
        *body, last = rollout.response(row)
        assert last in EOS
        assert not set(body) & set(EOS)


def test_a_prompt_is_sampled_the_same_in_any_batch(model: Any) -> None:
    """Alone, among longer and shorter prompts, and in another order."""
    noise = row_keys(5)
    whole = run(model, PROMPTS, noise)
    order = [3, 0, 4, 2, 1]
    moved = run(model, [PROMPTS[i] for i in order], noise[order])
    for row, prompt in enumerate(PROMPTS):
        alone = run(model, [prompt], noise[row : row + 1])
        assert alone.response(0) == whole.response(row) == moved.response(order.index(row))
        length = int(alone.lengths[0])
        torch.testing.assert_close(alone.logprobs[0, :length], whole.logprobs[row, :length], rtol=0, atol=1e-5)
        assert whole.tokens[row, : len(prompt)].tolist() == prompt


def test_the_seed_decides_the_tokens(model: Any) -> None:
    first = run(model, PROMPTS, row_keys(5, seed=1))
    torch.manual_seed(99)
    again, other, later = (run(model, PROMPTS, row_keys(5, seed=s, step=t)) for s, t in ((1, 0), (2, 0), (1, 1)))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logprobs, again.logprobs)
    for different in (other, later):
        assert all(first.response(row) != different.response(row) for row in range(5))


def test_equal_prompts_with_their_own_keys_differ(model: Any) -> None:
    rollout = run(model, [PROMPTS[0]] * 8, row_keys(8), Sampling(temperature=2.0, max_response_length=16))
    assert len({tuple(rollout.response(row)) for row in range(8)}) == 8


def test_without_keys_it_is_greedy_decoding(model: Any) -> None:
    rollout = run(model, PROMPTS, None)
    for row, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert rollout.response(row) == expected[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_a_plain_forward(model: Any) -> None:
    """At the sampling temperature and before top-k, although top-k is on; and every token is among the top k."""
    rollout = run(model, PROMPTS, row_keys(5))
    for row in range(5):
        length = int(rollout.lengths[row])
        expected = plain_logprobs(model, rollout, row, 0.7)
        torch.testing.assert_close(rollout.logprobs[row, :length].double(), expected, rtol=0, atol=1e-5)
        assert bool((rollout.logprobs[row, length:] == 0).all())
    one = run(model, PROMPTS, row_keys(5), Sampling(temperature=0.7, top_k=1, max_response_length=16))
    assert [one.response(r) for r in range(5)] == [run(model, PROMPTS, None).response(r) for r in range(5)]


def test_sampling_inverts_the_truncated_distribution(model: Any) -> None:
    """The engine against a plain loop: one prompt, no padding, no cache, fresh noise at every position."""
    noise = row_keys(5)
    rollout = run(model, PROMPTS, noise)
    for row, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for position in range(int(rollout.lengths[row])):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            probabilities = np.exp(logits.double().numpy() / 0.7)
            probabilities[np.argsort(-probabilities)[20:]] = 0.0
            tokens += inverse(probabilities[None], at_position(noise[row], position).reshape(1))
        assert rollout.response(row) == tokens[len(prompt) :]


def test_first_tokens_follow_the_tempered_distribution(model: Any) -> None:
    count = 4000
    rollout = run(model, [[20, 31]] * count, row_keys(count), Sampling(temperature=1.3, max_response_length=1))
    with torch.no_grad():
        logits = model(torch.tensor([[20, 31]])).logits[0, -1]
    probabilities = torch.softmax(logits.double() / 1.3, -1).numpy()
    counts = np.bincount(rollout.tokens[:, 2].numpy(), minlength=VOCABULARY)
    likely = probabilities * count >= 5
    pooled = np.append(probabilities[likely], probabilities[~likely].sum())
    assert chi_square(np.append(counts[likely], counts[~likely].sum()), pooled) < limit(len(pooled) - 1)


@pytest.mark.parametrize(
    "wish",
    [
        pytest.param({"repetition_penalty": 1.3}),
        pytest.param({"no_repeat_ngram_size": 2}),
        pytest.param({"min_new_tokens": 12}),
        pytest.param({"suppress_tokens": [20, 25]}),
        pytest.param({"num_beams": 2}),
        {"do_sample": True, "temperature": 0.3, "top_p": 0.5},
    ],
)
def test_the_model_s_own_generation_wishes_do_not_count(model: Any, wish: dict[str, Any]) -> None:
    """Instruct models ship a generation_config.json (Qwen2.5: repetition_penalty 1.05); the recipe alone decides."""
    expected = run(model, PROMPTS, row_keys(5))
    kept = model.generation_config
    try:
        model.generation_config = type(kept)(**wish)
        found = run(model, PROMPTS, row_keys(5))
    finally:
        model.generation_config = kept
    assert [found.response(r) for r in range(5)] == [expected.response(r) for r in range(5)]
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_vocabulary_of_specials_alone() -> None:
    """A model that knows pad and EOS and nothing else: its responses are pads, or end at once; every number is finite."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    only = LlamaForCausalLM(config).eval()
    found = sample(only, [[1], [1, 1]] * 8, row_keys(16), Sampling(max_response_length=4), pad=0, eos=[1])
    assert 1 in found.lengths.tolist(), "some response is EOS alone"
    assert bool(torch.isfinite(found.logprobs).all())
    for row in range(16):
        *before, last = found.response(row)
        assert set(before) <= {0}
        assert (last == 1) == bool(found.ended[row])
        assert found.ended[row] or found.lengths[row] == 4
