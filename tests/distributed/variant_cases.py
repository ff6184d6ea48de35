"""What `test_variants.py` asks warm ranks to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.distributed import cases
from tests.support.stages import run


def ppo_and_canary(recipe: str, run_dir: str, overrides: list[str]) -> list[float]:
    """Run PPO; the largest difference, per checked rollout, between rollout and training log-probabilities."""
    import stages.ppo.train as train

    seen: list[float] = []
    original = train.canary

    def canary(loop: Any, prompts: Any, rollout: Any, logprobs: torch.Tensor) -> str | None:
        seen.append(float((rollout.logprobs - logprobs).abs().max()))
        assert float(rollout.logprobs.abs().max()) > 0.1, "the policy is certain of everything: nothing to compare"
        return original(loop, prompts, rollout, logprobs)

    train.canary = canary
    try:
        run(recipe, "ppo", run_dir, overrides)
    finally:
        train.canary = original
    return seen


def read_together(recipe: str, run_dir: str, overrides: list[str]) -> dict[str, float]:
    """For each role of a trained adapter, how far what it says in one pass with the others is from what it says alone, and
    how far from what another role says: (role, other) -> largest difference."""
    loop, batch = cases._collected(recipe, run_dir, overrides)
    loop.learn(batch, 0)
    rollout = loop.sample(loop.prompts.take(0, 8), 0)
    tokens, starts, lengths = rollout.rows(torch.arange(len(rollout.lengths)))
    width = rollout.logprobs.shape[1]
    names = ["policy", "reference", "critic", "reward"]
    asked = (tokens, starts, lengths, width, 1.0)
    with loop.engine.module.evaluating():
        together = loop.engine("read", names, *asked)
        alone = {name: loop.engine("log_probs", name, *asked)[0] for name in names[:2]}
        alone["critic"] = loop.engine("values", "critic", tokens, starts, width)
        alone["reward"] = loop.engine("scores", "reward", tokens, starts + lengths)
    found = {name: float((together[name] - alone[name]).abs().max()) for name in names}
    return found | {"policy to reference": float((alone["policy"] - alone["reference"]).abs().max())}


def recorded_update(recipe: str, run_dir: str, overrides: list[str], target: str) -> list[list[int]]:
    """`cases.one_update`, and the rows of each micro-batch in the order they were trained on."""
    from stages.ppo.experience import Experience

    order: list[list[int]] = []
    original = Experience.rows

    def rows(self: Experience, index: torch.Tensor) -> Experience:
        order.append(index.tolist())
        return original(self, index)

    Experience.rows = rows  # type: ignore[method-assign]
    try:
        cases.one_update(recipe, run_dir, overrides, target)
    finally:
        Experience.rows = original  # type: ignore[method-assign]
    return order


def critic_start(recipe: str, run_dir: str, overrides: list[str]) -> dict[str, Any]:
    """How a critic stands before training, beside policy and reward model."""
    loop = cases._loop(recipe, run_dir, overrides)
    roles = loop.engine.module
    weights = {name: p.detach().float() for name, p in roles.named_parameters()}
    critic = {name: w for name, w in weights.items() if ".critic." in name and "lora_" in name}

    def distance(other: str) -> float:
        """Largest difference to another role's adapter, wherever that one is attached."""
        theirs = {name.partition(".trunks.")[2].partition(".")[2]: w for name, w in weights.items()}
        theirs |= {name.removeprefix("trunks.").partition(".")[2]: w for name, w in weights.items()}
        names = {name: name.removeprefix("trunks.").partition(".")[2] for name in critic}
        return max(
            float((w - theirs[names[n].replace(".critic.", f".{other}.")]).abs().max()) for n, w in critic.items()
        )

    head = roles.heads["critic"].weight.detach().float()
    return {
        "to_policy": distance("policy"),
        "to_reward": distance("reward"),
        "output_weight": max(float(w.abs().max()) for n, w in critic.items() if "lora_B" in n),
        "head_to_reward": float((head - roles.heads["reward"].weight.detach().float()).abs().max()),
        "head": float(head.abs().max()),
    }


def plain_deepspeed(path: str) -> dict[str, float]:
    """One step of plain DeepSpeed on a small network with the configuration file as it is: the weights' change."""
    import deepspeed

    from pipeline import engine

    engine.start(0)
    config = json.loads(Path(path).read_text())
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    started, _, _, _ = deepspeed.initialize(
        model=network, model_parameters=list(network.parameters()), config=config, dist_init_required=False
    )
    parameter = next(p for n, p in started.module.named_parameters() if n == "1.weight")

    def master() -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            return safe_get_full_fp32_param(parameter).clone()
        return torch.cat([p.detach().flatten() for group in started.optimizer.fp32_groups for p in group])

    before = master()
    loss = started(torch.ones(8, 8, dtype=torch.bfloat16, device=started.device)).float().pow(2).mean()
    started.backward(loss)
    started.step()
    return {
        "stage": float(started.zero_optimization_stage()),
        "moved": float((master() - before).abs().max()),
        "accumulation": float(started.gradient_accumulation_steps()),
    }
