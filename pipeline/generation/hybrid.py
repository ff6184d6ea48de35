"""Rollouts by DeepSpeed's own engine, `HybridEngineRollout`, over a role's language model.

DeepSpeed's hybrid engine is two things. One, `DeepSpeedHybridEngine` (`hybrid_engine.enabled`), puts CUDA kernels in place
of a model's layers; it cannot serve Relay and a recipe that asks for it is refused: it wants one generating model per
engine where Relay has all roles in one, its kernels read `layer.weight` and so leave out PEFT's adapters, and it has no
kernels for CPUs. The other, `HybridEngineRollout`, generates with the model as it is, adapters included. That is this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.rollout import HybridEngineRollout, RolloutRequest, SamplingConfig
from torch import Tensor
from transformers import GenerationConfig

from pipeline.config.schema import Sampling
from pipeline.generation.hf import left_padded, pack
from pipeline.generation.rollout import Rollout


def supported(model: Any) -> str | None:
    """None if this engine can decode `model`, else why not, in one line: it generates as `hf` does, but for how it asks."""
    if named := sorted(model.config._get_generation_parameters()):
        return (
            f"{type(model).__name__}'s config sets {', '.join(named)}, which belong in its generation config; "
            "transformers refuses DeepSpeed's call of generate then"
        )
    return None


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
) -> Rollout:
    """Sample one response per prompt; the arguments are those of `hf.sample`.

    The draws are torch's, from a generator seeded by all `keys`: the same call gives the same tokens, in a resumed run too,
    but a token depends on the batch it is sampled in, unlike with Relay's engines. Every row is decoded for
    `max_response_length` tokens and cut afterwards, which keeps ranks in step whether `synced` or not.
    """
    ids, mask = left_padded(prompts, pad, model.device)
    # DeepSpeed asks of an engine its module alone, and of a tokenizer these two numbers.
    engine = HybridEngineRollout(
        SimpleNamespace(module=model), SimpleNamespace(pad_token_id=pad, eos_token_id=eos or None)
    )
    config = SamplingConfig(
        max_new_tokens=sampling.max_response_length,
        temperature=0.0 if keys is None else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
    )
    # What DeepSpeed leaves unset (it has no min-p), generate takes from the model's own wishes.
    wishes = GenerationConfig(use_cache=True)
    if keys is not None and sampling.min_p:
        wishes = GenerationConfig(use_cache=True, do_sample=True, min_p=sampling.min_p)
    own, model.generation_config = model.generation_config, wishes
    listener = _Listener(sampling.temperature)
    hook = model.register_forward_hook(listener.hear, with_kwargs=True)
    try:
        with _seeded(keys, model.device):
            tokens = engine.generate(RolloutRequest(ids, mask), config).input_ids
    finally:
        hook.remove()
        model.generation_config = own
    logprobs = listener.logprobs(tokens[:, -1])
    whole = pack(prompts, tokens[:, ids.shape[1] :], logprobs, eos, pad)
    longest = int(whole.lengths.max())
    return Rollout(whole.tokens, whole.prompt_lengths, whole.lengths, whole.logprobs[:, :longest], whole.ended)


class _Listener:
    """Log-probabilities of sampled tokens from the logits they were sampled from, which DeepSpeed's engine does not return.

    A forward is fed the token that the forward before it gave rise to, so that one forward's logits are kept at a time.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.last: Tensor | None = None
        self.heard: list[Tensor] = []

    def hear(self, _module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._chosen(kwargs["input_ids"][:, -1])
        self.last = torch.log_softmax(output.logits[:, -1].float() / self.temperature, dim=-1)

    def logprobs(self, final: Tensor) -> Tensor:
        """Float32 [B, T], given the tokens int64 [B] of the last forward, which were fed to none."""
        self._chosen(final)
        return torch.stack(self.heard, dim=1)

    def _chosen(self, tokens: Tensor) -> None:
        if self.last is not None:
            self.heard.append(self.last.gather(1, tokens.unsqueeze(1)).squeeze(1))


@contextmanager
def _seeded(keys: Tensor | None, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded by all keys of a batch, and afterwards as they were: training draws from them too."""
    seed = 0
    for key in [] if keys is None else keys.tolist():
        seed = (seed * 1_000_003 + key + 1) % 2**63
    elsewhere = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(elsewhere, device_type=device.type if elsewhere else "cuda"):
        torch.manual_seed(seed)
        yield
