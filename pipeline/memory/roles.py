"""The models a stage works with, and which of them share one copy of their weights (section 7 of the design)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config.distill import Distill
from pipeline.config.evaluate import Evaluate, Policy
from pipeline.config.export import Export
from pipeline.config.glue import TASKS
from pipeline.config.kinds import estimators
from pipeline.config.merge import Merge
from pipeline.config.methods import METHODS
from pipeline.config.recipe import BASE, Recipe
from pipeline.config.schema import Adapter, Base, Classify, Ppo, Reward, Stage, reward_stages
from pipeline.config.selection import Selection


@dataclass(frozen=True)
class Role:
    """One model a stage works with. Roles with equal `weights`, `quantization` and kind of adapter share one copy of them.

    `model` is the base whose config.json gives the shape; a role that does not speak has a head of `outputs` scores in place
    of the output head; `adapter` is None where the weights themselves are the role's. `head_only` trains that head and nothing
    below it, on another role's hidden states. `unsharded` weights, if no other role has them, are whole on every rank.
    """

    name: Literal["policy", "reference", "critic", "reward", "teacher"]
    weights: str
    model: str
    quantization: Literal["nf4"] | None
    speaks: bool
    adapter: Adapter | None
    trained: bool
    head_only: bool = False
    outputs: int = 1
    unsharded: bool = False

    @property
    def mixes(self) -> bool:
        """Whether it reads in one batch with other roles on its copy of the weights."""
        return not (self.trained and self.adapter is None) and (
            self.adapter is None or METHODS[self.adapter.method].mixed
        )


def trunks(roles: list[Role]) -> list[tuple[str, ...]]:
    """Which copy of weights each role stands on, as a key: one for equal weights, quantisation and kind of adapter. What
    trains whole has its own; a role without an adapter stands on the first copy."""
    bases = [
        (r.weights, r.quantization or "", f"role {n}" if r.trained and r.adapter is None else "")
        for n, r in enumerate(roles)
    ]
    kinds = [METHODS[role.adapter.method].peft if role.adapter else "" for role in roles]
    first = {base: kind for base, kind in reversed(list(zip(bases, kinds, strict=True))) if kind}
    return [(*base, kind or first.get(base, "")) for base, kind in zip(bases, kinds, strict=True)]


def roles(recipe: Recipe, stage: str) -> list[Role]:
    """The models a stage works with, sharing weights as section 7 of the design says."""
    block = recipe.stages[stage]
    if isinstance(block, Evaluate):
        sides = [_tested(recipe, policy, block.base) for policy in (block.model, block.against) if policy is not None]
        sides += [_tested(recipe, policy, block.base) for policy in (block.forgetting.of if block.forgetting else ())]
        judging = [*block.reward, *(block.reward_model.of if block.reward_model else ())]
        judges = [_published(recipe, judge.stage, block.base, "reward") for judge in judging if judge.stage]
        return [*sides, *judges, *(_outside(judge.model, "reward", None) for judge in judging if judge.model)]
    if isinstance(block, Merge | Export):
        model = (block if isinstance(block, Merge) else recipe.stages[block.policy]).base.model
        return [Role("policy", model, model, None, speaks=True, adapter=None, trained=False)]
    if isinstance(block, Selection):
        return _selecting(recipe, block)
    full = block.adapter.is_full
    adapter = None if full else block.adapter
    start = _start(block)
    policy = Role(
        "policy",
        _below(recipe, stage, start),
        _model(recipe, start, block.base),
        block.base.quantization,
        speaks=not isinstance(block, Reward | Classify),
        adapter=adapter,
        trained=True,
        outputs=max(1, len(TASKS[block.task].labels)) if isinstance(block, Classify) else 1,
    )
    if isinstance(block, Distill):
        return [policy, _teacher(recipe, block)]
    if not isinstance(block, Ppo):
        return [policy]
    continued = start != BASE and block.adapter.continues(recipe.stages[start].adapter)
    copied = continued or not METHODS[block.adapter.method].identity
    reference = replace(policy, name="reference", adapter=adapter if copied else None, trained=False)
    names = reward_stages(*block.reward, *(block.gold or []))
    rewards = [_published(recipe, name, block.base, "reward") for name in names]
    if not estimators()[block.advantage_estimator].critic:
        return [policy, reference, *rewards]
    return [policy, reference, _critic(recipe, stage, block, policy, rewards), *rewards]


def _teacher(recipe: Recipe, block: Distill) -> Role:
    """On the student's copy of the weights unless it has others, or the student's method changes those below it."""
    given = block.teacher
    if given.stage is not None:
        found = _published(recipe, given.stage, block.base, "policy")
    else:
        model = str(given.model)
        found = Role("policy", model, model, given.quantization, speaks=True, adapter=None, trained=False)
    weights = found.weights if METHODS[block.adapter.method].shared else f"{found.weights} of the teacher"
    return replace(found, name="teacher", weights=weights, unsharded=True)


def _critic(recipe: Recipe, stage: str, block: Ppo, policy: Role, rewards: list[Role]) -> Role:
    """A role of its own on a shared base, a head on the policy's, or a model of its own, trained whole."""
    if block.critic.kind == "head":
        return replace(policy, name="critic", speaks=False, head_only=True)
    start = policy
    if block.critic.start == "reward":
        start = replace(rewards[0], weights=_below(recipe, stage, reward_stages(*block.reward)[0]))
    elif block.critic.start == "base":
        start = replace(policy, weights=block.base.model, model=block.base.model)
    critic = replace(start, name="critic", speaks=False, adapter=block.adapter, trained=True)
    if block.critic.kind == "model" or block.adapter.is_full:  # what trains whole is not quantised
        return replace(critic, adapter=None, quantization=None)
    return critic


def _selecting(recipe: Recipe, block: Selection) -> list[Role]:
    """The model that replies, the one whose states are read, and the reward model: of the chain, or from outside."""
    speaking = [*([block.necessity.model] if block.necessity else []), block.coverage.embedding]
    found = [_published(recipe, name, block.base, "policy") for name in dict.fromkeys(speaking)]
    if block.reward is None:
        return found
    if block.reward.stage is not None:
        return [*found, _published(recipe, block.reward.stage, block.base, "reward")]
    return [*found, _outside(str(block.reward.model), "reward", None)]


def _tested(recipe: Recipe, policy: Policy, base: Base) -> Role:
    if policy.stage is not None:
        return _published(recipe, policy.stage, base, "policy")
    return _outside(str(policy.model), "policy", base.quantization)


def _outside(model: str, role: Literal["policy", "reward"], quantization: Literal["nf4"] | None) -> Role:
    """A model that no stage made, whole on every rank."""
    return Role(role, model, model, quantization, speaks=role == "policy", adapter=None, trained=False)


def _published(recipe: Recipe, name: str, base: Base, role: Literal["policy", "reward"]) -> Role:
    """The frozen output of stage `name`, or the base itself. A reward model is quantised as it was when it trained."""
    speaks = role == "policy"
    if name == BASE:
        return Role(role, base.model, base.model, base.quantization, speaks, adapter=None, trained=False)
    block = recipe.stages[name]
    held = base if speaks else block.base
    adapter = None if block.adapter.is_full else block.adapter
    return Role(role, _standing(recipe, name), block.base.model, held.quantization, speaks, adapter, trained=False)


def _standing(recipe: Recipe, name: str) -> str:
    """Whose weights the output of stage `name` stands on: its own after full training, else those below its adapter."""
    block = recipe.stages[name]
    if isinstance(block, Merge):
        first = block.of[0]
        return _standing(recipe, first.stage) if first.run is None else block.base.model
    return f"output of {name}" if block.adapter.is_full else _below(recipe, name, _start(block))


def _below(recipe: Recipe, stage: str, parent: str) -> str:
    """Whose weights `stage` builds on when it starts from `parent`: an adapter of another shape is merged first."""
    block = recipe.stages[stage]
    if parent == BASE:
        return block.base.model
    adapter = recipe.stages[parent].adapter
    if adapter.is_full or block.adapter.continues(adapter):
        return _standing(recipe, parent)
    return f"{parent} merged for {stage}"


def _start(block: Stage) -> str:
    return str(block.policy if isinstance(block, Ppo) else getattr(block, "init", BASE))


def _model(recipe: Recipe, name: str, base: Base) -> str:
    return base.model if name == BASE else recipe.stages[name].base.model
