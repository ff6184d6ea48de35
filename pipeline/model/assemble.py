"""From batons to roles: which bases there are, which roles share one, which adapters and heads they get."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from pipeline import handoff
from pipeline.adapters import adalora, build, new_rows
from pipeline.config.methods import METHODS
from pipeline.config.schema import Base
from pipeline.data import templates
from pipeline.handoff import Baton
from pipeline.model import load
from pipeline.model.roles import Role, Roles
from pipeline.stage import Context

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """What one role is made of: the weights below it, the adapter on them, and its head.

    `adapter` is None for bare base weights, else (config, weights); a missing config is the recipe's, missing weights are
    fresh. `head` is None for a role that speaks; an empty one is fresh. `own` keeps the trunk unshared: its weights train.
    `reads` names the role whose hidden states the head reads; the part is then the head alone. `like` names the role whose
    adapter, as it starts, this one's is a copy of.
    """

    base: Base
    adapter: tuple[PeftConfig | None, Weights | None] | None = None
    head: Weights | None = None
    trained: bool = False
    own: bool = False
    reads: str | None = None
    like: str | None = None


def speaking(context: Context, baton: Baton | None) -> Part:
    """A frozen language model: a baton, or the base when there is none."""
    base = context.block.base
    if baton is None:
        return Part(base.model_copy(update={"model": context.base}))
    if not baton.is_adapter:
        return Part(base.model_copy(update={"model": str(baton.path), "revision": None}))
    baton.check_base()
    return Part(_recorded(baton, base), (build.frozen(baton.path), build.read(baton.path)[0]))


def scoring(baton: Baton, base: Base) -> Part:
    """A frozen reward model, its base held as when it was trained."""
    quantization = baton.manifest["base"]["quantization"]
    held = _recorded(baton, base).model_copy(update={"quantization": quantization})
    if not baton.is_adapter:
        return Part(held, head=build.read_head(baton.path))
    baton.check_base()
    weights, head = build.read(baton.path)
    return Part(held, (build.frozen(baton.path), weights), head)


def _recorded(baton: Baton, base: Base) -> Base:
    """`base` with the weights that a baton stands on: its recorded base, or itself when it is a full model."""
    revision = baton.manifest["base"]["revision"] if baton.is_adapter else None
    return base.model_copy(update={"model": baton.base, "revision": revision})


def assemble(context: Context, parts: dict[str, Part], tok: Any, *, sharded: bool, steps: int | None = None) -> Roles:
    """Load each distinct base once and attach the roles' adapters and heads.

    Roles share a trunk when their bases' content hashes and quantisation are equal, and their adapters of one kind: PEFT puts
    no others on one model. A trunk with a role that speaks is a causal language model, else a classifier without its head.
    `steps` are the optimizer steps for which fresh adapters will train.
    """
    described, parts = parts, {name: part for name, part in parts.items() if part.reads is None}
    hashes = {name: handoff.model_hash(p.base.model, p.base.revision) for name, p in parts.items()}
    bases = {name: (hashes[name], p.base.quantization, name if p.own else "") for name, p in parts.items()}
    kinds = {name: _kind(context, part) for name, part in parts.items()}
    # A role without an adapter stands on the first trunk of its base.
    first = {bases[name]: kind for name, kind in reversed(kinds.items()) if kind}
    keys = {name: (*base, kinds[name] or first.get(base, "")) for name, base in bases.items()}
    trunks: dict[str, Any] = {}
    heads: dict[str, nn.Linear] = {}
    roles: dict[str, Role] = {}
    for name, part in parts.items():
        sharers = [other for other in parts if keys[other] == keys[name]]
        trunk = sharers[0]
        if trunk not in trunks:
            speaks = any(parts[other].head is None for other in sharers)
            trunks[trunk] = (load.causal if speaks else load.classifier)(part.base, tok, sharded=sharded)
        if part.adapter is not None:
            config = part.adapter[0] or build.config(
                context.block.adapter, plain(trunks[trunk]), "CAUSAL_LM", steps, templates.added(tok)
            )
            trunks[trunk] = add_adapter(trunks[trunk], name, config, part.adapter[1])
        if part.like is not None:
            build.put(trunks[trunk], name, build.state(trunks[trunk], part.like))
        if part.head is not None:
            heads[name] = _head(trunks[trunk], part)
        roles[name] = Role(trunk, name if part.adapter is not None else None, part.trained)
    for name, part in described.items():
        if part.reads is not None:
            body = roles[part.reads]
            heads[name] = _head(trunks[body.trunk], part)
            roles[name] = Role(body.trunk, body.adapter, part.trained, part.reads)
    for trunk in trunks.values():
        if hasattr(plain(trunk), "score"):
            plain(trunk).score = nn.Identity()
    return Roles(trunks, heads, roles)


def plain(trunk: Any) -> Any:
    """The transformers model inside a trunk that may have adapters."""
    return trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk


def _kind(context: Context, part: Part) -> str:
    """PEFT's name of a part's adapter; empty without one."""
    if part.adapter is None:
        return ""
    given = part.adapter[0]
    return METHODS[context.block.adapter.method].peft if given is None else str(given.peft_type.value)


def add_adapter(trunk: Any, name: str, config: PeftConfig, weights: Weights | None) -> Any:
    """`trunk`, plain or with adapters already, with one more: that of `config`, and its weights unless it is fresh."""
    if tokens := new_rows.tokens_of(config):  # a reward model's adapter has no rows of an output head that is here
        config.trainable_token_indices = new_rows.indices(plain(trunk), tokens)
    speaks = hasattr(plain(trunk), "prepare_inputs_for_generation")  # PEFT refuses CAUSAL_LM on a classifier
    config.task_type, config.modules_to_save = "CAUSAL_LM" if speaks else None, None
    # PEFT allows one AdaLoRA adapter that trains on a model; which of a trunk's adapters do is for Roles to say.
    config.inference_mode = config.peft_type == "ADALORA" and hasattr(trunk, "peft_config")
    trunk = build.add(trunk, build.without_dropout(config), name)
    if weights is not None:
        build.put(trunk, name, weights)
        adalora.leave_out_empty(trunk, name)
    return trunk


def _head(trunk: Any, part: Part) -> nn.Linear:
    """A scalar head on the trunk's last hidden state: the published one, else normal with variance 1 / (width + 1)."""
    config = plain(trunk).config.get_text_config()
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    head = nn.Linear(width, 1, bias=False, dtype=load.DTYPES[part.base.dtype])
    if part.head:
        with torch.no_grad():
            head.weight.copy_(part.head["weight"])
    else:
        nn.init.normal_(head.weight, std=1.0 / math.sqrt(width + 1))
    return head
