"""Relay's rollout engine as a `deepspeed.runtime.rollout.RolloutEngine`, for trainers written against that interface."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from torch import Tensor

from pipeline.config.schema import Sampling
from pipeline.generation import engines
from pipeline.generation.rollout import Rollout, keys

log = logging.getLogger(__name__)


class StaticRollout(RolloutEngine):
    """Slots that decode together and take the next prompt as they come free, with noise that does not depend on batching.

        rollouts = StaticRollout(engine, tokenizer, seed=17)
        rollouts.sync_weights(step)
        batch = rollouts.generate(RolloutRequest(ids, mask), SamplingConfig(max_new_tokens=256, n_samples_per_prompt=4))

    `engine` is a DeepSpeed engine (or any object with `.module`) or the causal language model itself, with or without
    adapters that PEFT injects into its layers. A model that the static engine does not know is decoded by Hugging Face's
    `generate`, with the same tokens. Where DeepSpeed's own engine is greedy, or takes one sample, under continuous batching
    (`continuous_batch_size`, here the slots), this one samples any number; samples of a prompt that start together share its
    prefill. `rollout` keeps the last call's tokens with their log-probabilities, for which `RolloutBatch` has no place.
    """

    name = "static"

    def __init__(self, engine: Any, tokenizer: Any, *, eos: list[int] | None = None, seed: int = 0) -> None:
        """`eos` are the tokens that end a response, the tokenizer's unless given."""
        module = getattr(engine, "module", engine)
        if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"{type(module).__name__} feeds virtual tokens to its base model, which is decoded without them; use an "
                "adapter inside the layers, such as LoRA"
            )
        self.model = module.get_base_model() if hasattr(module, "get_base_model") else module
        own = tokenizer.eos_token_id
        self.eos = eos if eos is not None else [] if own is None else [own] if isinstance(own, int) else list(own)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (self.eos or [None])[0]
        if self.pad is None:
            raise ValueError("the tokenizer has neither a pad nor an EOS token to pad responses with")
        partitioned = getattr(engine, "zero_optimization_partition_weights", None)
        self.synced = partitioned is not None and bool(partitioned())
        reason = engines.unsupported("static", self.model)
        self.engine = "hf" if reason else "static"
        if reason:
            log.warning("rollouts use Hugging Face's generate: %s", reason)
        self.seed, self.step, self._taken = seed, 0, 0
        self.rollout: Rollout | None = None

    def sync_weights(self, step: int) -> None:
        """Begin `step`, from which and the seed all noise follows; weights are read where training keeps them."""
        self.step, self._taken = step, 0

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Responses to left-padded prompts, the samples of a prompt next to each other.

        `temperature <= 0` is greedy, `top_k <= 0` off. Calls between two `sync_weights` continue one stream of noise.
        """
        prompts, repeats = _unpadded(request), sampling.n_samples_per_prompt
        greedy = sampling.temperature <= 0
        settings = Sampling(
            temperature=1.0 if greedy else sampling.temperature,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
            max_response_length=sampling.max_new_tokens,
            batch=len(prompts) * repeats if sampling.continuous_batch_size is None else sampling.continuous_batch_size,
        )
        noise = self._keys(len(prompts), repeats)
        with _evaluating(self.model):
            self.rollout = engines.sample(
                self.engine,
                self.model,
                [prompt for prompt in prompts for _ in range(repeats)],
                None if greedy else noise,
                settings,
                pad=self.pad,
                eos=self.eos,
                synced=self.synced,
            )
        return _batch(request, self.rollout, repeats, self.pad)

    def _keys(self, prompts: int, repeats: int) -> Tensor:
        """One key per response, different for each prompt of the step on any rank, int64 [prompts * repeats]."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        numbers = (self._taken + torch.arange(prompts)) * world + rank
        self._taken += prompts
        samples = torch.arange(repeats).repeat(prompts)
        return keys(self.seed, self.step, numbers.repeat_interleave(repeats), samples).to(self.model.device)


def _unpadded(request: RolloutRequest) -> list[list[int]]:
    mask = request.prompt_attention_mask.bool()
    holes = (mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero().flatten().tolist()
    if holes:
        raise ValueError(f"prompt {holes[0]} is not padded on the left alone: its mask has a 0 after a 1")
    return [ids[real].tolist() for ids, real in zip(request.prompt_ids, mask, strict=True)]


def _batch(request: RolloutRequest, rollout: Rollout, repeats: int, pad: int) -> RolloutBatch:
    """DeepSpeed's layout: the prompts as they came, then responses padded on the right to the longest of them."""
    device, start = request.prompt_ids.device, request.prompt_ids.shape[1]
    steps = torch.arange(int(rollout.lengths.max()), device=rollout.tokens.device)
    columns = rollout.prompt_lengths.unsqueeze(1) + steps
    real = steps < rollout.lengths.unsqueeze(1)
    responses = rollout.tokens.gather(1, columns.clamp(max=rollout.tokens.shape[1] - 1)).masked_fill(~real, pad)
    prompts = request.prompt_ids.repeat_interleave(repeats, dim=0)
    prompt_mask = request.prompt_attention_mask.repeat_interleave(repeats, dim=0)
    return RolloutBatch(
        input_ids=torch.cat([prompts, responses.to(device)], dim=1),
        attention_mask=torch.cat([prompt_mask.long(), real.long().to(device)], dim=1),
        response_start_idx=torch.full((len(prompts),), start, dtype=torch.int64, device=device),
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Each module in evaluation mode, then as it was: in training mode there is dropout, and checkpointing drops the cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
