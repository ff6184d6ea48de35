"""Relay's rollout engine against `generate`, the reference engine and plain forwards, on tiny random models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.schema import Sampling
from pipeline.generation import hf, static
from pipeline.generation.rollout import Rollout, keys
from tests.support.tiny import SHAPES, build

pytestmark = pytest.mark.fast

VOCABULARY, PAD, EOS = 97, 0, [1, 5, 9]
LENGTHS = [3, 1, 8, 2, 5, 19, 9, 7, 11, 4, 13, 6]
PROMPTS = [[(17 * row + 7 * column) % 90 + 5 for column in range(length)] for row, length in enumerate(LENGTHS)]
SAMPLING = Sampling(temperature=0.7, max_response_length=20)


@pytest.fixture(scope="module", params=["llama", "qwen2", "opt", "gpt2", "gpt_neox"])
def each(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def row_keys(rows: int, seed: int = 0) -> Tensor:
    return keys(seed, 0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


def run(
    model: Any,
    prompts: list[list[int]],
    noise: Tensor | None,
    sampling: Sampling = SAMPLING,
    *,
    slots: int = 4,
    eos: list[int] = EOS,
    synced: bool = False,
) -> Rollout:
    return static.sample(model, prompts, noise, sampling, pad=PAD, eos=eos, slots=slots, synced=synced)


def responses(rollout: Rollout) -> list[list[int]]:
    return [rollout.response(row) for row in range(len(rollout.lengths))]


def plain_logits(model: Any, rollout: Rollout) -> list[Tensor]:
    """The logits [length, V] each response's tokens were drawn from, by one right-padded forward without a cache."""
    with torch.no_grad():
        logits = model(input_ids=rollout.tokens, use_cache=False).logits.float()
    starts, lengths = rollout.prompt_lengths.tolist(), rollout.lengths.tolist()
    return [row[start - 1 : start - 1 + n] for row, start, n in zip(logits, starts, lengths, strict=True)]


def check_logprobs(model: Any, rollout: Rollout, temperature: float) -> None:
    for row, logits in enumerate(plain_logits(model, rollout)):
        expected = torch.log_softmax(logits / temperature, -1)[range(len(logits)), rollout.response(row)]
        torch.testing.assert_close(rollout.logprobs[row, : len(logits)], expected, rtol=0, atol=1e-4)
        assert bool((rollout.logprobs[row, len(logits) :] == 0).all())


def check_same(found: Rollout, expected: Rollout) -> None:
    for name in ("tokens", "prompt_lengths", "lengths", "ended"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def reference(model: Any, sampling: Sampling = SAMPLING, eos: list[int] = EOS) -> Rollout:
    return hf.sample(model, PROMPTS, row_keys(len(PROMPTS)), sampling, pad=PAD, eos=eos)


@contextmanager
def forwards(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of every forward."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


# The same tokens.


def test_greedy_tokens_are_those_of_generate(each: Any) -> None:
    rollout = run(each, PROMPTS, None)
    for row, prompt in enumerate(PROMPTS[:6]):
        expected = each.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert rollout.response(row) == expected[0, len(prompt) :].tolist()
    check_logprobs(each, rollout, 0.7)


@pytest.mark.parametrize("slots", [1, 4, 40])
def test_sampled_tokens_are_those_of_the_reference_engine(each: Any, slots: int) -> None:
    assert static.supported(each) is None
    expected = reference(each)
    assert 0 < int(expected.ended.sum()) < len(PROMPTS), "some responses end and some are truncated"
    found = run(each, PROMPTS, row_keys(len(PROMPTS)), slots=slots)
    check_same(found, expected)
    check_logprobs(each, found, 0.7)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.6, 0.0), (12, 0.8, 0.0), (0, 1.0, 0.3)])
def test_truncated_sampling(model: Any, top_k: int, top_p: float, min_p: float) -> None:
    sampling = Sampling(temperature=1.3, top_k=top_k, top_p=top_p, min_p=min_p, max_response_length=12)
    expected = reference(model, sampling)
    check_same(run(model, PROMPTS, row_keys(len(PROMPTS)), sampling), expected)
    assert responses(expected) != responses(reference(model, Sampling(temperature=1.3, max_response_length=12)))


def test_tokens_invert_the_distribution_at_the_published_noise(model: Any) -> None:
    """Against the number of each position, computed here from the mixer's definition, after refills and shrinking."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    noise = row_keys(len(PROMPTS))
    rollout = run(model, PROMPTS, noise)
    for row, logits in enumerate(plain_logits(model, rollout)):
        words = [mix(int(noise[row]) ^ mix((t + 0xC2B2AE35) % 2**32)) for t in range(len(logits))]
        cumulative = np.cumsum(torch.softmax(logits.double() / 0.7, -1).numpy(), axis=1)
        drawn = [int(np.searchsorted(c, (mix(word) + 0.5) / 2**32)) for c, word in zip(cumulative, words, strict=True)]
        assert rollout.response(row) == drawn


def test_eager_attention() -> None:
    eager = build(attention="eager")
    check_same(run(eager, PROMPTS, row_keys(len(PROMPTS))), reference(eager))


def test_bfloat16_tokens_where_they_are_decided() -> None:
    """Greedy tokens equal the plain forward's wherever its two best logits are further apart than bf16's error."""
    model = build().to(torch.bfloat16)
    rollout = run(model, PROMPTS, None)
    decided = 0
    for row, logits in enumerate(plain_logits(model, rollout)):
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 0.04 * logits.abs().amax(-1)
        decided += int(clear.sum())
        assert bool((logits.argmax(-1) == torch.tensor(rollout.response(row)))[clear].all())
    assert decided > 0.5 * int(rollout.lengths.sum())
    assert rollout.logprobs.dtype == torch.float32


def test_the_active_adapter_counts() -> None:
    """Adapter on and off differ, each is what the reference engine gives, and the weights stay as they are."""
    base = build()
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    inner = peft.get_base_model()
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    noise = row_keys(len(PROMPTS))
    on = run(inner, PROMPTS, noise)
    check_same(on, reference(inner))
    with peft.disable_adapter():
        off = run(inner, PROMPTS, noise)
        check_same(off, reference(inner))
    assert responses(on) != responses(off)
    assert responses(run(inner, PROMPTS, noise)) == responses(on)
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())
    assert not on.logprobs.requires_grad


# Slots.


def test_a_slot_takes_the_next_prompt_at_once(model: Any) -> None:
    """With four slots, where a quarter is one: as many steps as when the longest waiting prompt goes to the first free one."""
    prompts = [prompt for prompt in PROMPTS if len(prompt) != 2]  # whose prefill of one column would look like a step
    with forwards(model) as seen:
        rollout = run(model, prompts, row_keys(len(prompts)))
    free = [0] * 4
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        free[0] += int(rollout.lengths[row])
        free.sort()
    assert sum(columns == 1 for _, columns in seen) == max(free)
    assert len([rows for rows, columns in seen if columns > 1]) >= 3, "several prefills"
    assert max(rows for rows, _ in seen) == 4


def test_slots_are_refilled_a_quarter_at_a_time(model: Any) -> None:
    prompts = [[20 + row, 30 + row, 31] for row in range(24)]
    with forwards(model) as seen:
        run(model, prompts, row_keys(24), slots=8)
    first, *later, last = [rows for rows, columns in seen if columns > 1]
    assert first == 8
    assert len(later) >= 2
    assert min(later) >= 2
    assert first + sum(later) + last == 24


def test_order_does_not_matter(model: Any) -> None:
    noise = row_keys(len(PROMPTS))
    whole = responses(run(model, PROMPTS, noise))
    for seed in (0, 1):
        order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(seed)).tolist()
        moved = run(model, [PROMPTS[row] for row in order], noise[order], slots=3)
        assert responses(moved) == [whole[row] for row in order]
        assert moved.tokens[0, : len(PROMPTS[order[0]])].tolist() == PROMPTS[order[0]]


def test_samples_of_one_prompt_share_its_prefill(model: Any) -> None:
    """Three prompts of 8, 19 and 11 tokens, four samples each in turn: one prefill of three rows for twelve slots."""
    prompts = [PROMPTS[row] for row in (2, 5, 8)] * 4
    with forwards(model) as seen:
        rollout = run(model, prompts, row_keys(12), slots=12)
    assert [shape for shape in seen if shape[1] > 1] == [(3, 18)], "the last token of a prompt is decoded"
    check_same(rollout, hf.sample(model, prompts, row_keys(12), SAMPLING, pad=PAD, eos=EOS))
    assert len({tuple(response) for response in responses(rollout)[::3]}) == 4


def test_one_token_prompts_need_no_prefill(model: Any) -> None:
    prompts = [[20], [31], [20]]
    with forwards(model) as seen:
        rollout = run(model, prompts, row_keys(3))
    assert {columns for _, columns in seen} == {1}
    check_same(rollout, hf.sample(model, prompts, row_keys(3), SAMPLING, pad=PAD, eos=EOS))


def test_the_batch_shrinks_when_nothing_waits(model: Any) -> None:
    with forwards(model) as seen:
        rollout = run(model, PROMPTS, row_keys(len(PROMPTS)), slots=len(PROMPTS))
    sizes = [rows for rows, columns in seen if columns == 1]
    assert sizes == sorted(sizes, reverse=True)
    running = [int((rollout.lengths > step).sum()) for step in range(len(sizes))]
    assert all(live <= size < max(live, 2) * 4 / 3 + 1 for live, size in zip(running, sizes, strict=True))


@pytest.mark.parametrize("count", [6, 60])
def test_memory_does_not_grow_with_the_prompts(model: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of 2 layers: 4 slots x 2 heads x (5 + 20 - 1 columns, rounded up to 32) x 16 numbers."""
    made: list[int] = []

    class Counted(static.SlotCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            found = super().update(*args, **kwargs)
            made.append(sum(layer.numel() for layer in (*self.keys, *self.values)))
            return found

    monkeypatch.setattr(static, "SlotCache", Counted)
    prompts = [[20 + row % 60, 31, 42, 53, 64][: 2 + row % 4] for row in range(count)]
    run(model, prompts, row_keys(count))
    assert max(made) == 2 * 2 * 4 * 2 * 32 * 16


# Ends.


def test_every_response_ends_at_once(model: Any) -> None:
    with forwards(model) as seen:
        rollout = run(model, PROMPTS, row_keys(len(PROMPTS)), eos=list(range(VOCABULARY)), slots=12)
    assert rollout.lengths.tolist() == [1] * 12
    assert bool(rollout.ended.all())
    assert rollout.logprobs.shape == (12, 1)
    assert len(seen) == 2
    check_same(rollout, reference(model, eos=list(range(VOCABULARY))))


def test_no_response_ends(model: Any) -> None:
    """All of them run to max_response_length, prompts as long as the context allows among them."""
    prompts = [*PROMPTS, [(3 * t) % 90 + 5 for t in range(108)]]
    rollout = run(model, prompts, row_keys(13), eos=[VOCABULARY + 1])
    assert rollout.lengths.tolist() == [20] * 13
    assert not bool(rollout.ended.any())
    check_same(rollout, hf.sample(model, prompts, row_keys(13), SAMPLING, pad=PAD, eos=[VOCABULARY + 1]))


def test_one_token_responses(model: Any) -> None:
    sampling = Sampling(max_response_length=1)
    check_same(run(model, PROMPTS, row_keys(12), sampling), reference(model, sampling))


# Ranks in step.


def test_ranks_run_equally_many_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, as threads, with different work: each forward of one meets one of the other, and tokens are the same."""
    barrier, flags = threading.Barrier(2, timeout=30), [0, 0]
    found: list[tuple[Rollout, int]] = []

    def all_reduce(flag: Tensor, op: Any) -> None:
        rank = int(threading.current_thread().name)
        flags[rank] = int(flag)
        barrier.wait()
        flag.fill_(max(flags))
        barrier.wait()

    monkeypatch.setattr(static.dist, "all_reduce", all_reduce)
    prompts, noise, models = [PROMPTS, PROMPTS[:2]], row_keys(12), [build(), build()]

    def work(rank: int) -> None:
        with forwards(models[rank]) as seen:
            rollout = run(models[rank], prompts[rank], noise[: len(prompts[rank])], synced=True)
        found.append((rollout, len(seen)))

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (few, first), (many, second) = sorted(found, key=lambda each: len(each[0].lengths))
    assert first == second
    check_same(many, reference(build()))
    assert responses(few) == responses(many)[:2]


# What is refused.


def test_models_that_fall_back() -> None:
    """Each for its own reason, told in one line."""

    def reason(**values: Any) -> str:
        config = AutoConfig.for_model(vocab_size=VOCABULARY, **values)
        return told(AutoModelForCausalLM.from_config(config))

    def told(model: Any) -> str:
        line = static.supported(model)
        assert line is None or "\n" not in line
        return str(line)

    mistral = {**SHAPES["llama"], "model_type": "mistral"}
    assert reason(**mistral, sliding_window=None) == "None"
    assert "DynamicSlidingWindowLayer" in reason(**mistral, sliding_window=16)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic RoPE" in reason(**SHAPES["llama"], rope_parameters=rope)
    assert "position_ids" in reason(model_type="bloom", hidden_size=32, n_layer=1, n_head=2)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert "not causal" in reason(model_type="bert", **small)
    assert "own way" in reason(model_type="gptj", n_embd=32, n_layer=1, n_head=2, rotary_dim=4)
    flash, encoder = build(), build()
    flash.config._attn_implementation = "flash_attention_2"
    encoder.config.is_encoder_decoder = True
    assert "flash_attention_2" in told(flash)
    assert "encoder-decoder" in told(encoder)


def test_inputs_that_cannot_be_sampled(model: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has 109 tokens: .* up to 20 .* context of 128"):
        run(model, [[20], [20] * 109], None)
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        run(model, [[20], [21], []], None)
    with pytest.raises(ValueError, match="0 prompts"):
        run(model, [], None)
    with pytest.raises(ValueError, match="0 slots"):
        run(model, [[20]], None, slots=0)
