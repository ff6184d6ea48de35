"""The reference rollout engine: Hugging Face `generate`, for any model and any method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.config.schema import Sampling
from pipeline.generation.rollout import Rollout, at_position, pick


class CounterSampling(LogitsProcessor):
    """Leaves greedy decoding one token: the sampled one, by counter-based noise; keeps its log-probability.

    `keys` is int64 [B], or None for greedy decoding.
    """

    def __init__(self, sampling: Sampling, keys: Tensor | None) -> None:
        self.sampling, self.keys = sampling, keys
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / self.sampling.temperature, dim=-1)
        keys = None if self.keys is None else at_position(self.keys, len(self.logprobs))
        chosen = pick(logprobs, keys, self.sampling).unsqueeze(1)
        self.logprobs.append(logprobs.gather(1, chosen).squeeze(1))
        return torch.full_like(logprobs, float("-inf")).scatter_(1, chosen, 0.0)


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    keys: Tensor | None,
    sampling: Sampling,
    *,
    pad: int,
    eos: list[int],
    synced: bool = False,
    streamer: Any = None,
) -> Rollout:
    """Sample one response per prompt. `synced` keeps ranks in step under ZeRO-3, where each forward is collective; a
    `streamer` of transformers is given the tokens of a single response as they come."""
    ids, mask = left_padded(prompts, pad, model.device)
    processor = CounterSampling(sampling, keys)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_response_length, pad_token_id=pad, eos_token_id=eos, use_cache=True
    )
    own, model.generation_config = model.generation_config, config  # generate fills what is unset from the model's own
    try:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=synced,
            logits_processor=LogitsProcessorList([processor]),
            streamer=streamer,
        )
    finally:
        model.generation_config = own
    responses = output[:, ids.shape[1] :]
    logprobs = torch.stack(processor.logprobs[: responses.shape[1]], dim=1)
    return pack(prompts, responses, logprobs, eos, pad)


def left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids, mask that is 1 on them), int64 [B, longest prompt]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)


def pack(prompts: list[list[int]], responses: Tensor, logprobs: Tensor, eos: list[int], pad: int) -> Rollout:
    """Responses [B, T] as they were decoded, cut after the first EOS and joined to their prompts without a gap."""
    device = responses.device
    is_eos = torch.isin(responses, torch.tensor(eos, device=device))
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, responses.shape[1])
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.full((len(prompts), int((prompt_lengths + lengths).max())), pad, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + int(lengths[row])
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        tokens[row, len(prompt) : end] = responses[row, : int(lengths[row])]
    rollout = Rollout(tokens, prompt_lengths, lengths, logprobs, ended)
    return Rollout(tokens, prompt_lengths, lengths, logprobs * rollout.mask, ended)
