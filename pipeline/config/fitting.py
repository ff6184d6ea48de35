"""Whether a stage's fine-tuning method can do what the stage asks of it, from the records in `pipeline.config.methods`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.architectures import HOLD_BIASES, PACK, PACK_ATTENTION, names
from pipeline.config.export import Export
from pipeline.config.kinds import DATA, estimators
from pipeline.config.methods import METHODS
from pipeline.config.schema import Adapter, Frozen, Ppo, Stage, reward_stages
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

CONV1D = ("gpt2",)
"""Families whose linear layers are transposed."""


def check_method(recipe: Recipe, stage: str, deepspeed: dict[str, Any]) -> None:
    """Raise UserError, naming a method that works, for a training stage whose method cannot do what it asks."""
    block = recipe.stages[stage]
    adapter, where = block.adapter, recipe.where("stages", stage, "adapter", "method")
    method, config = METHODS[adapter.method], known_config(recipe.local(block.base.model))
    fix = f"write `method: {method.instead}`"
    if block.base.quantization and adapter.is_full:
        raise UserError(
            where,
            "full fine-tuning of a 4-bit base",
            expected="full-precision weights to train",
            fix="write `method: lora` (QLoRA), or `quantization: null`",
        )
    if block.base.quantization and not method.four_bit:
        raise UserError(where, f"{adapter.method} on a 4-bit base: {method.why}", fix=fix)
    if deepspeed.get("zero_optimization", {}).get("stage", 0) == 3:
        if not method.zero3:
            raise UserError(where, f"{adapter.method} under ZeRO-3: {method.why}", fix=f"{fix}, or use zero2")
        if block.base.quantization and not method.four_bit_zero3:
            found = f"{adapter.method} on a 4-bit base under ZeRO-3: {method.why}"
            raise UserError(where, found, fix=f"{fix}, or use zero2")
    if config.get("model_type") in CONV1D and not method.conv1d:
        raise UserError(where, f"{adapter.method} on {config['model_type']}: {method.why}", fix=fix)
    if adapter.method == "adalora":
        _check_pruning(recipe.where("stages", stage, "adapter", "tinit"), block)
    if isinstance(block, Ppo):
        _check_ppo(where, block)
    if getattr(block, "packing", False):
        check_packing(recipe, stage, config.get("model_type"))
    if config:
        check_modules(adapter, config["model_type"], recipe.where("stages", stage, "adapter", "modules"))
    if config.get("attn_logit_softcapping") and prefixed(adapter.method):
        raise UserError(
            where,
            f"{adapter.method} on {config['model_type']}, whose attention has a soft cap that SDPA does not compute",
            fix="write `method: adapter_parallel`",
        )
    _check_parents(recipe, stage, block, config.get("model_type"))


def _check_ppo(where: str, block: Ppo) -> None:
    """Policy, reference and critic stand on one copy of the base; rollouts may want a merged one."""
    name, method = block.adapter.method, METHODS[block.adapter.method]
    if not method.shared:
        raise UserError(
            where, f"{name} in PPO, whose roles share one base: {method.why}", fix=f"write `method: {method.instead}`"
        )
    told = method.additive and not (
        name == "adalora" and block.base.quantization
    )  # PEFT's 4-bit AdaLoRA cannot tell it
    if block.sampling.adapter == "merged" and not (told or block.adapter.is_full):
        raise UserError(
            where.replace("adapter.method", "sampling.adapter"),
            f"rollouts by a merged copy, and {name} adds no matrix to the weights"
            + (" of a 4-bit base" if method.additive else ""),
            fix="write `adapter: auto`",
        )


def _check_pruning(where: str, block: Stage) -> None:
    """Where the recipe says how many optimizer steps there are, AdaLoRA's ranks must have some to fall in; a frozen actor's
    schedule is shorter by those it waits for."""
    total, waits = getattr(block, "steps", None), 0
    if total is None:
        return  # epochs over data that nobody has counted yet: the stage itself will check
    if isinstance(block, Ppo):
        updates = block.epochs * block.minibatches
        total, waits = total * updates, block.freezing_actor_steps * updates
    check_room(where, *pruning(block.adapter, total), total - waits)


def pruning(adapter: Adapter, total: int) -> tuple[int, int]:
    """(steps before AdaLoRA's ranks fall, steps after they are final) of `total` optimizer steps. What the recipe gives is a
    number of steps, or below 1 a share of them, rounded up: what `warmup` means."""

    def steps(given: float) -> int:
        return math.ceil(given * total) if given < 1 else int(given)

    return steps(adapter.tinit), max(1, steps(adapter.tfinal))


def check_room(where: str, first: int, last: int, total: int) -> None:
    """Raise UserError unless AdaLoRA has a step to prune in, of `total` between the `first` and the `last`."""
    if first >= total - last:
        raise UserError(
            where,
            f"ranks would be pruned between step {first} and step {total - last}, of {total}",
            expected="tinit + tfinal below the optimizer steps in which the adapter trains",
            fix="lower tinit or tfinal, or write them as shares of the steps, such as 0.1 and 0.2",
        )


def check_packing(recipe: Recipe, stage: str, family: str | None) -> None:
    """Raise UserError where packed rows would see each other; `family` is the base's model_type, None if not yet known."""
    block, where = recipe.stages[stage], recipe.where("stages", stage, "packing")
    if not METHODS[block.adapter.method].packs:
        raise UserError(
            where,
            f"packing with {block.adapter.method}, whose virtual tokens stand before the first row of a sequence alone",
            fix="write `method: p_tuning_v2`, which has a prefix in every layer, or `packing: false`",
        )
    if block.base.attn_implementation not in PACK_ATTENTION:
        raise UserError(
            where,
            f"packing with attention {block.base.attn_implementation}",
            expected=" or ".join(PACK_ATTENTION) + ", which keep the rows of several sequences apart",
            fix="write `attn_implementation: sdpa`, or `packing: false`",
        )
    if family is not None and family not in PACK:
        raise UserError(
            where,
            f"packing on model_type {family!r}, which is not known to keep the rows of a sequence apart",
            expected="one of: " + ", ".join(PACK),
            fix="write `packing: false`",
        )


def check_modules(adapter: Adapter, family: str, where: str) -> None:
    """Raise UserError when a method needs names of modules that nobody knows for this family of models."""
    missing = [slot for slot in needed(adapter.method) if not names(family, adapter.modules)[slot]]
    if missing:
        raise UserError(
            where,
            f"{adapter.method} does not know what model_type {family!r} calls its modules",
            expected=f"names for {', '.join(missing)}",
            fix=f"write `modules: {{{missing[0]}: [NAME]}}` with the names that `print(model)` shows, or use lora",
        )


def needed(method: str) -> tuple[str, ...]:
    """The slots of `Names` that a method uses."""
    return {
        "ia3": ("key_value", "feed_forward_output"),
        "ln_tuning": ("norms",),
        "adapter_houlsby": ("attention_output", "feed_forward_output"),
        "adapter_pfeiffer": ("feed_forward_output",),
        "adapter_parallel": ("feed_forward",),
        "prefix_tuning": ("query",),
        "p_tuning_v2": ("query",),
        "mam": ("query", "feed_forward"),
        "unipelt": ("query", "query_value", "feed_forward_output"),
        "loreft": ("blocks",),
        "direft": ("blocks",),
    }.get(method, ())


def prefixed(method: str) -> bool:
    """Whether the method puts keys and values before the text."""
    return "query" in needed(method)


def check_attention(recipe: Recipe, stage: str) -> None:
    """Raise UserError where an adapter with a prefix, this stage's own or one it reads, meets another attention than SDPA."""
    block = recipe.stages[stage]
    speaking = [parent for name in recipe.parents(stage) if (parent := recipe.stages[name]).kind not in DATA]
    read = [parent.adapter.method for parent in speaking]
    methods = [*([] if isinstance(block, Frozen) else [block.adapter.method]), *read]
    found = next((method for method in methods if prefixed(method)), None)
    if found is not None and block.base.attn_implementation != "sdpa":
        raise UserError(
            recipe.where("stages", stage, "base", "attn_implementation"),
            f"{found} with {block.base.attn_implementation}",
            expected="sdpa, by which a prefix is attended to",
            fix="write `attn_implementation: sdpa`",
        )


def check_export(recipe: Recipe, stage: str, block: Export) -> None:
    """Raise UserError for a policy whose adapter cannot become part of the base."""
    adapter = recipe.stages[block.policy].adapter
    why = unmergeable(adapter, known_config(recipe.local(block.base.model)).get("model_type"))
    if why is not None:
        raise UserError(
            recipe.where("stages", stage, "policy"),
            f"stage {block.policy}, whose {adapter.method} adapter cannot become part of the base: {why}",
            expected="a full model, or an adapter that merges",
            fix=f"write `adapter: {{method: {METHODS[adapter.method].instead}}}` in stage {block.policy}",
        )


def _check_parents(recipe: Recipe, stage: str, block: Stage, family: str | None) -> None:
    """A stage of another method builds on its parent's adapter merged into the base: it must be one that merges."""
    starts = [(key, getattr(block, key), False) for key in ("init", "policy") if hasattr(block, key)]
    if isinstance(block, Ppo) and estimators()[block.advantage_estimator].critic:
        whole = block.critic.kind == "model"
        if block.critic.start == "reward":
            starts.append(("reward", reward_stages(*block.reward)[0], whole))
        elif block.critic.start == "policy" and whole:
            starts.append(("policy", block.policy, True))
    for key, name, whole in starts:
        if name not in recipe.stages:
            continue
        parent = recipe.stages[name].adapter
        if parent.is_full or (block.adapter.continues(parent) and not whole):
            continue
        method, why = METHODS[parent.method], unmergeable(parent, family)
        if why is None:
            continue
        builds = "a critic with weights of its own" if whole else block.adapter.method
        raise UserError(
            recipe.where("stages", stage, key),
            f"{builds} on top of {name}, whose {parent.method} adapter cannot become part of the base: {why}",
            expected=f"{parent.method} with the same keys here, or a parent that merges",
            fix=f"write `adapter: {{method: {method.instead}}}` in stage {name}",
        )


def unmergeable(adapter: Adapter, family: str | None) -> str | None:
    """Why an adapter cannot become part of the weights of a base of `family`; None if it can."""
    method = METHODS[adapter.method]
    if method.mergeable and adapter.method == "bitfit" and family is not None and family not in HOLD_BIASES:
        return f"{family} has no place for all of its biases"
    return None if method.mergeable else method.why


def can_pack(block: Stage, family: str) -> bool:
    """Whether rows packed into one sequence do not see each other: by the method, the attention and the base's model_type."""
    return METHODS[block.adapter.method].packs and block.base.attn_implementation in PACK_ATTENTION and family in PACK


def known_config(model: str) -> dict[str, Any]:
    """config.json of a base that is a folder here; empty for one that is not, which the stage itself will check."""
    file = Path(model) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("model_type") else {}
