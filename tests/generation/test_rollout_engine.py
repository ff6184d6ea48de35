"""Relay's engine behind DeepSpeed's rollout interface, against DeepSpeed's own engine and `generate`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.rollout import (
    HybridEngineRollout,
    ResponseTokenBatch,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
)
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from pipeline.generation.rollout_engine import StaticRollout
from tests.support.tiny import SHAPES, build

pytestmark = pytest.mark.fast

PAD = 0
LENGTHS = [3, 1, 8, 19, 9, 5]
PROMPTS = [[(17 * row + 7 * column) % 90 + 5 for column in range(length)] for row, length in enumerate(LENGTHS)]
GREEDY = SamplingConfig(max_new_tokens=16, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=16, temperature=0.8, top_p=0.95, top_k=40, n_samples_per_prompt=3)


def request(prompts: list[list[int]] = PROMPTS, pad: int = PAD) -> RolloutRequest:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    return RolloutRequest(ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]))


def tokenizer(eos: Any = (1, 5, 9), pad: int | None = PAD) -> Any:
    return SimpleNamespace(pad_token_id=pad, eos_token_id=list(eos) if isinstance(eos, tuple) else eos)


def relay(model: Any, tok: Any = None, **options: Any) -> StaticRollout:
    return StaticRollout(SimpleNamespace(module=model), tok or tokenizer(), **options)


def tokens(batch: RolloutBatch) -> list[list[int]]:
    """The responses."""
    start = int(batch.response_start_idx[0])
    return [
        ids[start:][mask[start:].bool()].tolist()
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


# Against DeepSpeed's own engine.


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("ends", [True, False], ids=["some end", "none ends"])
def test_greedy_batches_are_deepspeeds(shape: str, ends: bool) -> None:
    """Ids, masks and starts, of prompts of different lengths padded on the left; DeepSpeed's are padded to max_new_tokens."""
    model = build(shape)
    free = tokens(relay(model, tokenizer(eos=None)).generate(request(), GREEDY))
    tok = tokenizer(eos=tuple({response[5 + row] for row, response in enumerate(free[:3])}) if ends else None)
    found = relay(model, tok).generate(request(), GREEDY)
    expected = HybridEngineRollout(SimpleNamespace(module=model), tok).generate(request(), GREEDY)
    if not ends:
        expected.attention_mask[:, 19:] = 1  # DeepSpeed hides a response's own pads; see the test of masks below
    missing = expected.seq_len - found.seq_len
    assert torch.equal(F.pad(found.input_ids, (0, missing), value=PAD), expected.input_ids)
    assert torch.equal(F.pad(found.attention_mask, (0, missing)), expected.attention_mask)
    assert torch.equal(found.response_start_idx, expected.response_start_idx)
    for name in ("input_ids", "attention_mask", "response_start_idx"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert (len({len(response) for response in tokens(found)}) > 1) == ends


def test_greedy_tokens_are_those_of_generate(model: Any) -> None:
    """Each prompt by itself; under continuous batching, too."""
    for slots in (None, 1, 2):
        sampling = SamplingConfig(max_new_tokens=16, temperature=-1.0, continuous_batch_size=slots)
        for prompt, response in zip(PROMPTS, tokens(relay(model).generate(request(), sampling)), strict=True):
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=16,
                eos_token_id=[1, 5, 9],
                pad_token_id=PAD,
            )
            assert response == expected[0, len(prompt) :].tolist()


def test_deepspeed_reads_the_batch(model: Any) -> None:
    """Its training targets are the responses, and nothing else."""
    batch = relay(model).generate(request(), SAMPLED)
    training = ResponseTokenBatch.from_rollout(batch)
    for row, response in enumerate(tokens(batch)):
        assert training.target_ids[row][training.response_mask[row]].tolist() == response


# Layout.


def test_layout(model: Any) -> None:
    """Prompts as they came, three samples of each next to each other, responses cut after EOS and padded on the right."""
    batch, asked = relay(model).generate(request(), SAMPLED), request()
    assert batch.batch_size == 18
    assert torch.equal(batch.input_ids[:, :19], asked.prompt_ids.repeat_interleave(3, 0))
    assert torch.equal(batch.attention_mask[:, :19], asked.prompt_attention_mask.repeat_interleave(3, 0))
    assert batch.response_start_idx.tolist() == [19] * 18
    lengths = [len(response) for response in tokens(batch)]
    assert batch.seq_len == 19 + max(lengths)
    assert min(lengths) < 16, "some end"
    for row, response in enumerate(tokens(batch)):
        assert batch.input_ids[row, 19 : 19 + len(response)].tolist() == response
        assert batch.input_ids[row, 19 + len(response) :].tolist() == [PAD] * (batch.seq_len - 19 - len(response))
        assert not set(response[:-1]) & {1, 5, 9}
        assert response[-1] in {1, 5, 9} or len(response) == 16
    assert len({tuple(r) for r in tokens(batch)[:3]}) == 3


def test_masks_do_not_read_pads(model: Any) -> None:
    """A response that holds the pad's id is all there, unlike in DeepSpeed's own batch; so is an EOS that is the pad."""
    first = tokens(relay(model, tokenizer(eos=None)).generate(request(), GREEDY))[0]
    inside = tokenizer(eos=None, pad=first[4])
    asked = request(pad=first[4])
    batch = relay(model, inside).generate(asked, GREEDY)
    assert tokens(batch)[0] == first
    theirs = HybridEngineRollout(SimpleNamespace(module=model), inside).generate(asked, GREEDY)
    assert torch.equal(theirs.input_ids, batch.input_ids)
    assert int(theirs.attention_mask[0].sum()) < int(batch.attention_mask[0].sum())

    same = relay(model, tokenizer(eos=first[4], pad=None)).generate(request(pad=first[4]), GREEDY)
    assert tokens(same)[0] == first[: first.index(first[4]) + 1]


# Sampling.


def test_noise_follows_seed_step_and_prompt(model: Any) -> None:
    """Not slots, earlier calls of another step, or torch's generator."""
    rollouts = relay(model, seed=3)
    rollouts.sync_weights(7)
    first = tokens(rollouts.generate(request(), SAMPLED))
    second = tokens(rollouts.generate(request(), SAMPLED))
    torch.manual_seed(99)
    rollouts.sync_weights(8)
    later = tokens(rollouts.generate(request(), SAMPLED))
    rollouts.sync_weights(7)
    assert tokens(rollouts.generate(request(PROMPTS[:2]), SAMPLED)) == first[:6]
    assert tokens(rollouts.generate(request(PROMPTS[2:]), SAMPLED)) == first[6:]
    other = relay(model, seed=4)
    other.sync_weights(7)
    for different in (second, later, tokens(other.generate(request(), SAMPLED))):
        assert sum(a != b for a, b in zip(first, different, strict=True)) >= 17

    for slots in (1, 4):
        narrow = relay(model, seed=3)
        narrow.sync_weights(7)
        assert (
            tokens(narrow.generate(request(), SamplingConfig(**{**vars(SAMPLED), "continuous_batch_size": slots})))
            == first
        )


def test_truncation(model: Any) -> None:
    """top_k of 1 and a tiny top_p are greedy; top_k <= 0 is off."""
    greedy = tokens(relay(model).generate(request(), GREEDY))
    for values in ({"top_k": 1}, {"top_p": 1e-6}):
        assert (
            tokens(relay(model).generate(request(), SamplingConfig(max_new_tokens=16, temperature=2.0, **values)))
            == greedy
        )
    off = [
        tokens(relay(model).generate(request(), SamplingConfig(max_new_tokens=16, temperature=2.0, top_k=k)))
        for k in (-1, 0, 97)
    ]
    assert off[0] == off[1] == off[2] != greedy


def test_samples_share_their_prompts_prefill(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    try:
        relay(model).generate(request(), SAMPLED)
    finally:
        hook.remove()
    assert [shape for shape in seen if shape[1] > 1] == [(5, 18)], "five of six prompts have more than one token"
    assert seen[1] == (18, 1)


def test_log_probabilities_are_kept(model: Any) -> None:
    rollouts = relay(model)
    batch = rollouts.generate(request(), SAMPLED)
    assert rollouts.rollout is not None
    with torch.no_grad():
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits[:, 18:-1]
    expected = torch.log_softmax(logits / 0.8, -1).gather(2, batch.input_ids[:, 19:, None]).squeeze(2)
    torch.testing.assert_close(rollouts.rollout.logprobs, expected * batch.attention_mask[:, 19:], rtol=0, atol=1e-4)


# What it decodes.


def test_engines_models_and_adapters() -> None:
    """The language model itself, a DeepSpeed engine's `.module`, an injected adapter: each as it is in the model."""
    base = build()
    plain = tokens(StaticRollout(base, tokenizer()).generate(request(), GREEDY))
    assert plain == tokens(relay(base).generate(request(), GREEDY))
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    on = tokens(relay(peft).generate(request(), GREEDY))
    assert on != plain
    with peft.disable_adapter():
        assert tokens(relay(peft).generate(request(), GREEDY)) == plain
    prefix = get_peft_model(build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="virtual tokens"):
        relay(prefix)


def test_training_mode_is_left_as_it_was() -> None:
    """Dropout, and recomputed activations that would drop the cache, do not touch a rollout; frozen parts stay in eval."""
    model = build(attention_dropout=0.5)
    expected = tokens(relay(model).generate(request(), GREEDY))
    model.gradient_checkpointing_enable()
    model.train()
    model.lm_head.eval()
    assert tokens(relay(model).generate(request(), GREEDY)) == expected
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training


def test_models_that_fall_back_give_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """A sliding window wider than the text changes nothing but the cache, which the static engine does not know."""
    static = relay(build("llama", model_type="mistral", sliding_window=None), seed=1)
    other = relay(build("llama", model_type="mistral", sliding_window=100), seed=1)
    assert (static.engine, other.engine) == ("static", "hf")
    assert "DynamicSlidingWindowLayer" in caplog.text
    for sampling in (GREEDY, SAMPLED, SamplingConfig(**{**vars(SAMPLED), "continuous_batch_size": 4})):
        assert tokens(other.generate(request(), sampling)) == tokens(static.generate(request(), sampling))
    never = relay(other.model, tokenizer(eos=None)).generate(request(), GREEDY)
    assert [len(response) for response in tokens(never)] == [16] * 6


def test_what_is_refused(model: Any) -> None:
    rollouts: RolloutEngine = relay(model)
    right = RolloutRequest(torch.tensor([[20, 21], [20, 0]]), torch.tensor([[1, 1], [1, 0]]))
    with pytest.raises(ValueError, match="prompt 1 is not padded on the left alone"):
        rollouts.generate(right, GREEDY)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        rollouts.generate(RolloutRequest(torch.tensor([[0, 0]]), torch.tensor([[0, 0]])), GREEDY)
    with pytest.raises(ValueError, match="top_p"):
        rollouts.generate(request(), SamplingConfig(max_new_tokens=4, top_p=0.0))
    with pytest.raises(ValueError, match="neither a pad nor an EOS"):
        relay(model, tokenizer(eos=None, pad=None))
