"""Proximal policy optimisation (or a critic-free estimator) against a reward, with a KL penalty to the starting policy.

Reads a policy (or the base), reward models or other sources of reward, and prompts; hands on the trained policy in the same
form. Policy, reference, critic and reward models share one copy of the base's weights wherever their bases are equal. It
does not use a separate inference server.

    deepspeed --num_gpus 2 --module stages.ppo --recipe quickstart --stage ppo --run-dir runs/quickstart
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers.integrations import HfDeepSpeedConfig

from pipeline import checkpoint, engine, memory
from pipeline.adapters import lora_plus
from pipeline.adapters.adalora import Allocation
from pipeline.adapters.build import belongs
from pipeline.config.methods import METHODS
from pipeline.config.recipe import deepspeed_config
from pipeline.config.schema import Base, Ppo
from pipeline.data import encode, encoded
from pipeline.data.split import Counts
from pipeline.errors import UserError
from pipeline.generation.whole import Whole
from pipeline.model import begin
from pipeline.model.assemble import assemble, plain
from pipeline.model.load import eos_ids, tokenizer
from pipeline.model.roles import Roles
from pipeline.stage import Context, main
from stages.ppo.assemble import parts, reward_roles, sharing
from stages.ppo.ema import Ema
from stages.ppo.ptx import Mixture
from stages.ppo.rewards import Rewards
from stages.ppo.stream import Stream
from stages.ppo.train import Loop
from stages.ppo.update import Updater


@dataclass(frozen=True)
class Setup:
    """A PPO run ready to start or to resume: the loop, where the policy's base lies, the tokenizer, the data (prompts, and
    what is mixed in), ZeRO stage."""

    loop: Loop
    base: Base
    tok: Any
    counts: Counts
    others: dict[str, Counts]
    zero: int


def ppo(context: Context) -> None:
    """Proximal policy optimisation."""
    block = cast(Ppo, context.block)
    setup = prepare(context, block)
    loop = setup.loop
    resume = engine.agreed(checkpoint.newest(context.checkpoints) if context.is_main else None)
    if resume:
        context.resumes(resume)
        loop.resume(resume)

    with context.tracker(block.steps, loop.step) as tracker:
        loop.run(tracker)
    metrics = {f"signals/{name}, steps": float(held) for name, held in loop.watch.raised.items()}
    metrics |= {"skipped_batches": float(loop.skipped)} if loop.skipped else {}
    if block.publish == "best" and loop.best_step:
        best = context.checkpoints / f"step-{loop.best_step}"
        if problem := engine.agreed(checkpoint.damage(best) if context.is_main else None):
            raise UserError(
                str(best), f"the best checkpoint is damaged: {problem}", fix="run the stage again with --from"
            )
        loop.resume(best)
    if loop.held_out and block.publish != "ema":  # the average is published, not the policy that could be evaluated
        metrics |= loop.evaluate()

    base = begin.base_record(setup.base)
    averaged = loop.ema.average if loop.ema and block.publish == "ema" else {}
    # An average holds a little of every singular value that was ever there.
    if "policy" in loop.update.allocations and block.publish != "ema":
        loop.update.allocations["policy"].publish()
    write = begin.writer(loop.engine.module.trunks["policy"], setup.tok, base, "policy", instead=averaged)
    context.publish(
        write,
        base=base,
        method=block.adapter.method,
        metrics=metrics,
        counts=setup.counts,
        zero_stage=setup.zero,
        others=setup.others,
    )


def prepare(context: Context, block: Ppo) -> Setup:
    """Data, roles, optimizer and engine, as the recipe says and before any training."""
    engine.start(block.seed, context.recipe.header.deterministic)
    parent = context.parent("policy")
    tok = begin.tokenizer(context, parent)
    _check_tokenizers(context, tok)
    encoder = encode.Encoder(tok)
    prompts, held_out, counts = encoded.prompts(context, tok, block.sampling.max_prompt_length)
    context.require_held_out(block.eval_every, len(held_out))

    config = configuration(context, block)
    zero = engine.zero_stage(config)
    sharding = HfDeepSpeedConfig(config) if zero == 3 else None  # while it lives, weights are sharded as they load
    described = parts(context)
    updates = block.steps * block.epochs * block.minibatches
    roles = assemble(context, described, tok, sharded=sharding is not None, steps=updates)
    _check_context(context, block, roles)
    if context.is_main:
        print(f"roles on one copy of their weights: {sharing(roles)}", flush=True)
    roles.sharded = zero == 3
    if engine.agreed(copies(context, block, roles) if context.is_main else None):
        roles.sample_whole("policy")
    if block.gradient_checkpointing:
        roles.checkpoint_activations()
    allocations = allocations_of(roles, block)
    engine.fit_buckets(config, roles)
    optimizer = optimizer_for(roles, block)
    clipping = engine.RoleClipping(optimizer, partitioned=zero > 0)
    started = engine.initialize(roles, optimizer, config)
    models, where = reward_roles(block), context.recipe.where("stages", context.stage, "reward")
    holds = _holds(roles, "policy")
    mixture, others = mixed_in(context, block, encoder, holds and holds - len(roles.virtual("policy")))
    trunk = f"trunks.{roles.roles['policy'].trunk}."
    policy = {n: p for n, p in roles.named_parameters() if p.requires_grad and n.startswith(trunk)}
    if not block.adapter.is_full:
        policy = {n: p for n, p in policy.items() if belongs(n.removeprefix(trunk), "policy")}
    loop = Loop(
        context,
        block,
        started,
        Updater(block, started, clipping, mixture, allocations),
        Rewards.of(block.reward, models, encoder, where),
        Rewards.of(block.gold, models, encoder, where) if block.gold else None,
        encoder,
        Stream(prompts, block.seed),
        held_out,
        eos_ids(plain(roles.trunks["policy"])),
        synced=zero == 3 and context.world_size > 1,
        ema=Ema(started, {n.removeprefix(trunk): p for n, p in policy.items()}, block.ema_decay)
        if block.ema_decay
        else None,
    )
    return Setup(loop, described["policy"].base, tok, counts, others, zero)


def copies(context: Context, block: Ppo, roles: Roles) -> bool:
    """Whether rollouts are sampled from a copy of the policy: as in the checkpoint to resume, else as the memory plan says.
    Raises UserError when their cache does not fit the device."""
    where = memory.device(context.recipe, context.stage)
    if torch.cuda.is_available():
        where = replace(where, bytes=float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory))
    newest = checkpoint.newest(context.checkpoints)
    if newest is not None and not checkpoint.resized(newest, context.size):
        return bool(json.loads((newest / "state.json").read_text(encoding="utf-8")).get("copies", False))
    try:
        memory.check_rollout(context.recipe, context.stage, where)
        room = memory.merged_copy_fits(context.recipe, context.stage, where.bytes, where.kind)
    except memory.Unknown:
        room = False  # a family of models that the plan does not count
    adapted = roles.roles["policy"].adapter is not None
    needed = METHODS[block.adapter.method].additive if adapted else roles.sharded
    needed = needed and Whole.possible(roles.trunks[roles.roles["policy"].trunk])
    return needed and (block.sampling.adapter == "merged" or (block.sampling.adapter == "auto" and room))


def _check_tokenizers(context: Context, tok: Any) -> None:
    """Refuse a reward model that reads other token ids, or conversations otherwise, than the policy writes."""
    for name, baton in context.batons.items():
        if baton.manifest["base"] is None:  # rows
            continue
        theirs = tokenizer(str(baton.path), trust=context.block.base.trust_remote_code)
        if theirs.get_vocab() != tok.get_vocab() or theirs.chat_template != tok.chat_template:
            raise UserError(
                context.recipe.where("stages", context.stage),
                f"the tokenizer of {name} is not the policy's",
                expected="one vocabulary and one chat template in all of them",
                fix="train them on bases with the same tokenizer",
            )


def _holds(roles: Roles, name: str) -> int | None:
    """Tokens that a role's context holds, if its model says."""
    limit = getattr(
        plain(roles.trunks[roles.roles[name].trunk]).config.get_text_config(), "max_position_embeddings", None
    )
    return None if limit is None else int(limit)


def _check_context(context: Context, block: Ppo, roles: Roles) -> None:
    """Refuse prompts and responses that together do not fit a role's context."""
    longest = block.sampling.max_prompt_length + block.sampling.max_response_length
    for name in roles.roles:
        limit = _holds(roles, name)
        virtual = len(roles.virtual(name))
        if limit is not None and longest + virtual > limit:
            raise UserError(
                context.recipe.where("stages", context.stage, "sampling"),
                f"max_prompt_length + max_response_length is {longest} tokens, and the {name}'s context holds {limit}"
                + (f", {virtual} of them virtual" if virtual else ""),
                expected=f"at most {limit - virtual}",
                fix="lower one of them",
            )


def mixed_in(
    context: Context, block: Ppo, encoder: encode.Encoder, limit: int | None
) -> tuple[Mixture | None, dict[str, Counts]]:
    """The rows of `ptx`, at most `limit` tokens long, and where each of its data rows went."""
    if block.ptx is None:
        return None, {}
    longest = min(block.ptx.max_length, limit or block.ptx.max_length)
    data = encoded.demonstrations(context, encoder.tokenizer, longest, block.ptx.loss_on, "ptx.data")
    mixture = Mixture(block.ptx, data.train, block.seed, block.steps, encoder.tokenizer.pad_token_id)
    return mixture, {"ptx.data": data.counts}


def configuration(context: Context, block: Ppo) -> dict[str, Any]:
    """The stage's DeepSpeed configuration: one optimizer step per minibatch; clipping is per role, not DeepSpeed's."""
    share = block.rollout_batch // block.minibatches // context.world_size
    return engine.overlay(
        deepspeed_config(context.recipe, context.stage),
        dtype=block.base.dtype,
        micro_batch=1,
        accumulation=max(2, share),  # at most; the update says itself which micro-batch is a minibatch's last
        max_grad_norm=0.0,
    )


def allocations_of(roles: Roles, block: Ppo) -> dict[str, Allocation]:
    """AdaLoRA's rank allocation for each role that trains such an adapter."""
    waits = {"policy": block.freezing_actor_steps * block.epochs * block.minibatches}
    return {
        name: Allocation(roles.trunks[role.trunk], name, waits.get(name, 0))
        for name, role in roles.roles.items()
        if block.adapter.method == "adalora" and role.trained and role.adapter == name
    }


def optimizer_for(roles: Roles, block: Ppo) -> torch.optim.Optimizer:
    """One optimizer with a group per trained role, each with its own learning rate, decay and clipping norm; two groups
    where the second factors of LoRA learn at another rate."""
    critic = block.critic
    settings: dict[str, dict[str, Any]] = {
        "policy": {
            "peak_lr": block.lr,
            "weight_decay": block.weight_decay,
            "max_grad_norm": block.max_grad_norm,
        },
    }
    if "critic" in roles.roles:
        settings["critic"] = {
            "peak_lr": critic.lr or block.lr,
            "weight_decay": block.weight_decay if critic.weight_decay is None else critic.weight_decay,
            "max_grad_norm": block.max_grad_norm if critic.max_grad_norm is None else critic.max_grad_norm,
        }
    groups = []
    for role, own in settings.items():
        parts = lora_plus.groups(roles.named_trainable(role), block.adapter.lr_ratio)
        for suffix, (factor, params) in zip(("", "_B"), parts, strict=False):
            rate = own["peak_lr"] * factor
            groups.append({**own, "name": role + suffix, "role": role, "params": params, "peak_lr": rate, "lr": rate})
    if block.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=block.lr)
    return torch.optim.AdamW(groups, lr=block.lr, betas=block.betas, eps=1e-8)


if __name__ == "__main__":
    main(ppo)
