"""Proximal policy optimisation against a reward model, with a KL penalty to the policy it starts from.

Reads a policy (or the base), a reward model and prompts; hands on the trained policy in the same form. Policy, reference,
critic and reward share one copy of the base's weights wherever their bases are equal. It does not use a separate
inference server.

    deepspeed --num_gpus 2 --module stages.ppo --recipe quickstart --stage ppo --run-dir runs/quickstart
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.integrations import HfDeepSpeedConfig

from pipeline import checkpoint, engine
from pipeline.config.recipe import deepspeed_config
from pipeline.config.recipe import split as split_batch
from pipeline.config.schema import Base, Ppo
from pipeline.data import encode
from pipeline.data.split import Split, load
from pipeline.errors import UserError
from pipeline.model import begin
from pipeline.model.assemble import assemble, plain
from pipeline.model.load import eos_ids, tokenizer
from pipeline.model.roles import Roles
from pipeline.stage import Context, main
from stages.ppo.assemble import parts, sharing
from stages.ppo.train import Loop, Prompts


@dataclass(frozen=True)
class Setup:
    """A PPO run ready to start or to resume: the loop, where the policy's base lies, the tokenizer, the data, ZeRO stage."""

    loop: Loop
    base: Base
    tok: Any
    split: Split
    zero: int


def ppo(context: Context) -> None:
    """Proximal policy optimisation."""
    block = cast(Ppo, context.block)
    setup = prepare(context, block)
    loop = setup.loop
    resume = engine.agreed(checkpoint.newest(context.checkpoints) if context.is_main else None)
    if resume:
        loop.resume(resume)

    with context.tracker(block.steps, loop.step) as tracker:
        loop.run(tracker)
    if block.publish == "best" and loop.best_step:
        best = context.checkpoints / f"step-{loop.best_step}"
        if problem := engine.agreed(checkpoint.damage(best) if context.is_main else None):
            raise UserError(
                str(best), f"the best checkpoint is damaged: {problem}", fix="run the stage again with --from"
            )
        loop.resume(best)
    metrics = loop.evaluate() if loop.held_out else {}

    base = begin.base_record(setup.base)
    write = begin.writer(loop.engine.module.trunks["policy"], setup.tok, base, "policy")
    context.publish(
        write, base=base, method=block.adapter.method, metrics=metrics, split=setup.split, zero_stage=setup.zero
    )


def prepare(context: Context, block: Ppo) -> Setup:
    """Data, roles, optimizer and engine, as the recipe says and before any training."""
    engine.start(block.seed)
    parent = context.parent("policy")
    tok = tokenizer(str(parent.path) if parent else context.base, block.base.revision)
    encoder, split = encode.Encoder(tok), load(context.recipe, context.stage)
    prompts = encode.prompts(encoder, split, "train", block.sampling.max_prompt_length)
    held_out = encode.prompts(encoder, split, "held_out", block.sampling.max_prompt_length)
    context.require_held_out(block.eval_every, held_out)
    if not prompts:
        raise UserError(
            context.recipe.where("stages", context.stage, "sampling", "max_prompt_length"),
            f"every prompt is longer than {block.sampling.max_prompt_length} tokens",
            fix="raise it",
        )

    config = configuration(context, block)
    zero = engine.zero_stage(config)
    sharding = HfDeepSpeedConfig(config) if zero == 3 else None  # while it lives, weights are sharded as they load
    described = parts(context)
    roles = assemble(context, described, tok, sharded=sharding is not None)
    if context.is_main:
        print(f"roles on one copy of their weights: {sharing(roles)}", flush=True)
    if block.gradient_checkpointing:
        roles.checkpoint_activations(reentrant=zero == 3)
    engine.fit_buckets(config, roles)
    eos = eos_ids(plain(roles.trunks["policy"]))
    optimizer = optimizer_for(roles, block)
    clipping = engine.RoleClipping(optimizer, partitioned=zero > 0)
    loop = Loop(
        context,
        block,
        engine.initialize(roles, optimizer, config),
        clipping,
        encoder,
        Prompts(prompts, block.seed),
        held_out,
        eos,
        synced=zero == 3 and context.world_size > 1,
    )
    return Setup(loop, described["policy"].base, tok, split, zero)


def configuration(context: Context, block: Ppo) -> dict[str, Any]:
    """The stage's DeepSpeed configuration: one optimizer step per minibatch; clipping is per role, not DeepSpeed's."""
    micro, accumulation = split_batch(
        context.recipe.where("stages", context.stage, "rollout_batch"),
        block.rollout_batch // block.minibatches,
        context.world_size,
        block.micro_batch,
    )
    return engine.overlay(
        deepspeed_config(context.recipe, context.stage),
        dtype=block.base.dtype,
        micro_batch=micro,
        accumulation=accumulation,
        max_grad_norm=0.0,
    )


def optimizer_for(roles: Roles, block: Ppo) -> torch.optim.Optimizer:
    """One optimizer with a group per trained role, each with its own learning rate, decay and clipping norm."""
    critic = block.critic
    groups = [
        {
            "name": "policy",
            "params": roles.trainable("policy"),
            "peak_lr": block.lr,
            "weight_decay": block.weight_decay,
            "max_grad_norm": block.max_grad_norm,
        },
        {
            "name": "critic",
            "params": roles.trainable("critic"),
            "peak_lr": critic.lr or block.lr,
            "weight_decay": block.weight_decay if critic.weight_decay is None else critic.weight_decay,
            "max_grad_norm": block.max_grad_norm if critic.max_grad_norm is None else critic.max_grad_norm,
        },
    ]
    for group in groups:
        group["lr"] = group["peak_lr"]
    if block.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=block.lr)
    return torch.optim.AdamW(groups, lr=block.lr, betas=block.betas, eps=1e-8)


if __name__ == "__main__":
    main(ppo)
