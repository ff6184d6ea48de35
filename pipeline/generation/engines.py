"""The rollout engines behind one interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.config.schema import Sampling
from pipeline.generation import hf, hybrid, static
from pipeline.generation.rollout import Rollout, join


def unsupported(engine: str, model: Any) -> str | None:
    """Why `engine` cannot decode the causal language model `model`, in one line, or None; `hf` can decode any."""
    if engine == "hf":
        return None
    return (hybrid if engine == "deepspeed" else static).supported(model)


def sample(
    engine: str,
    model: Any,
    prompts: list[list[int]],
    keys: Tensor | None,
    sampling: Sampling,
    *,
    pad: int,
    eos: list[int],
    synced: bool = False,
) -> Rollout:
    """One response per prompt, `sampling.batch` at a time; see `hf.sample` for the arguments.

    Under ZeRO-3 every rank has equally many prompts.
    """
    size = sampling.batch
    if engine == "static":
        return static.sample(model, prompts, keys, sampling, pad=pad, eos=eos, synced=synced, slots=size)
    parts = [
        (hybrid if engine == "deepspeed" else hf).sample(
            model,
            prompts[start : start + size],
            None if keys is None else keys[start : start + size],
            sampling,
            pad=pad,
            eos=eos,
            synced=synced,
        )
        for start in range(0, len(prompts), size)
    ]
    return join(parts, pad)
