"""The roles of PPO as a recipe describes them (section 7 of the design)."""

from __future__ import annotations

import json
from typing import cast

from pipeline.adapters import build
from pipeline.config.methods import METHODS
from pipeline.config.schema import Base, Ppo, reward_stages
from pipeline.model import begin
from pipeline.model.assemble import Part, scoring
from pipeline.model.roles import Roles
from pipeline.stage import Context
from stages.ppo.advantage import ESTIMATORS


def reward_roles(block: Ppo) -> dict[str, str]:
    """The role of each reward stage, those of `gold` included: `reward`, `reward1`, … in the recipe's order."""
    return {stage: f"reward{i or ''}" for i, stage in enumerate(reward_stages(*block.reward, *(block.gold or [])))}


def parts(context: Context) -> dict[str, Part]:
    """Policy, reference, the critic if the estimator has one, reward models (and `base`). A parent that cannot be continued
    is written out whole first."""
    block = cast(Ppo, context.block)
    full = block.adapter.is_full
    below, continued = begin.base_below(context, context.parent("policy"), "causal")
    weights = build.read(continued.path)[0] if continued else None
    policy = Part(below, None if full else (None, weights), trained=True, own=full)
    if continued:
        reference = Part(below, (build.frozen(continued.path), weights))
    elif METHODS[block.adapter.method].identity:
        reference = Part(below)  # the policy as PPO starts is the base with the adapter off
    else:
        reference = Part(below, (None, None), like="policy")
    rewards = {role: scoring(context.batons[stage], block.base) for stage, role in reward_roles(block).items()}
    described = {"policy": policy, "reference": reference}
    if ESTIMATORS[block.advantage_estimator].critic:
        described["critic"] = _critic(context, policy, rewards)
    described |= rewards
    if weights and not build.is_identity(block.adapter.method, weights):
        # For the canary alone: the policy's base with its adapter, which is not the identity, off; on the same trunk.
        described["base"] = Part(below)
    return described


def _critic(context: Context, policy: Part, rewards: dict[str, Part]) -> Part:
    block = cast(Ppo, context.block)
    start, whole = block.critic.start, block.critic.kind == "model"
    full = block.adapter.is_full or whole
    if block.critic.kind == "head":
        return Part(policy.base, head={}, trained=True, reads="policy")
    if start == "base":
        base = block.base.model_copy(update={"model": context.base})
        return Part(_trainable(base, full), None if full else (None, None), {}, trained=True, own=full)
    if start == "policy":
        below = begin.base_below(context, context.parent("policy"), "causal", whole=True)[0] if whole else policy.base
        return Part(_trainable(below, full), None if full else policy.adapter, {}, trained=True, own=full)
    reward = rewards["reward"]
    baton = context.batons[reward_stages(*block.reward)[0]]
    below, continued = begin.base_below(context, baton, "classifier", whole=whole)
    weights = build.read(continued.path)[0] if continued else None
    if not full:  # on the reward model's trunk, held as it is there
        below = below.model_copy(update={"quantization": reward.base.quantization})
    return Part(_trainable(below, full), None if full else (None, weights), reward.head, trained=True, own=full)


def _trainable(base: Base, full: bool) -> Base:
    """`base` as its weights can be trained: packed ones cannot."""
    return base.model_copy(update={"quantization": None}) if full else base


def sharing(roles: Roles) -> str:
    """Which roles share a copy of the weights: a list of groups."""
    groups: dict[str, list[str]] = {}
    for name, role in roles.roles.items():
        if name == "base":
            continue
        groups.setdefault(role.trunk, []).append(name)
    return json.dumps(list(groups.values()))
