"""What `test_rollouts.py` asks warm ranks to do."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist

from tests.support.stages import barrier


def sharded_and_whole(shape: str, prompts: list[list[list[int]]]) -> dict[str, Any]:
    """Each rank's responses to its own `prompts`, three to each, by a DeepSpeed engine's model under ZeRO-3, and by a whole
    copy of it in the same way; and whether the parameters were sharded."""
    import deepspeed
    from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

    from pipeline.engine import start
    from pipeline.generation.rollout_engine import StaticRollout
    from tests.support.tiny import build

    class Tokenizer:
        pad_token_id, eos_token_id = 0, [1, 5, 9]

    start(0)
    model, mine = build(shape, torch_dtype="float32"), prompts[dist.get_rank()]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True},
    )
    width = max(map(len, mine))
    request = RolloutRequest(
        torch.tensor([[0] * (width - len(p)) + p for p in mine]),
        torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in mine]),
    )
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.8, n_samples_per_prompt=3, continuous_batch_size=4)
    found = {}
    for name, where in (("sharded", engine), ("whole", build(shape))):
        rollouts = StaticRollout(where, Tokenizer(), seed=5)
        rollouts.sync_weights(2)
        found[name] = rollouts.generate(request, sampling).input_ids.tolist()
    answer = {**found, "sizes": sorted({parameter.numel() for parameter in model.parameters()})}
    engine.destroy()
    del engine, model
    gc.collect()
    barrier()
    return answer
