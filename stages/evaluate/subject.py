"""The policies that an evaluate stage tests: stages of the run, the base, and models that no stage made."""

from __future__ import annotations

from typing import Any

from pipeline import handoff
from pipeline.adapters import build
from pipeline.config.evaluate import Policy
from pipeline.config.recipe import BASE, digest
from pipeline.config.selection import Scorer
from pipeline.errors import UserError
from pipeline.handoff import Baton
from pipeline.model import load
from pipeline.model.assemble import Part, speaking
from pipeline.stage import Context


def baton(context: Context, policy: Policy) -> Baton | None:
    """The stage's baton; None for the base and for a model from outside."""
    return None if policy.stage in (None, BASE) else context.batons[str(policy.stage)]


def part(context: Context, policy: Policy, tok: Any) -> Part:
    """What the policy's role is made of. Raises UserError for one that does not share the vocabulary of `tok`."""
    if policy.model is None:
        return speaking(context, baton(context, policy))
    base, model = context.block.base, context.recipe.local(policy.model)
    base = base.model_copy(update={"trust_remote_code": policy.trust_remote_code})
    folder = handoff.model_folder(model, policy.revision)
    if not (folder / handoff.ADAPTER_CONFIG).is_file():
        found = Part(base.model_copy(update={"model": model, "revision": policy.revision}))
    else:
        config = build.frozen(folder)
        below = {"model": config.base_model_name_or_path, "revision": config.revision}
        found = Part(base.model_copy(update=below), (config, build.read(folder)[0]))
    theirs = load.tokenizer(str(found.base.model), found.base.revision, trust=policy.trust_remote_code)
    if theirs.get_vocab() != tok.get_vocab():
        raise UserError(
            context.recipe.where("stages", context.stage),
            f"{policy.model} has another vocabulary than the models it is tested with",
            expected="one vocabulary",
            fix="test it in an evaluate stage of its own",
        )
    return found


def identity(context: Context, policy: Policy) -> str:
    """A hash of what the policy is: its weights, those below an adapter, and the precision in which it is held."""
    base = context.block.base
    return digest([_weights(context, policy), base.dtype, base.quantization, base.attn_implementation])


def judge_identity(context: Context, scorer: Scorer) -> str:
    """The same of a reward model."""
    held = scorer if scorer.model is not None else context.block.base
    return digest([_weights(context, scorer), held.dtype, held.attn_implementation])


def _weights(context: Context, of: Policy | Scorer) -> str:
    if of.stage == BASE:
        return handoff.model_hash(context.base, context.block.base.revision)
    if of.model is not None:
        return handoff.outside_hash(context.recipe.local(of.model), of.revision)
    found = context.batons[str(of.stage)]
    return digest([found.content_hash, found.manifest["base"]["content_hash"]])
