"""What a stage starts from and what it publishes: the base or a parent's baton in, a plain model or adapter folder out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig

from pipeline import handoff
from pipeline.adapters import build
from pipeline.config.methods import METHODS
from pipeline.config.schema import Base
from pipeline.config.tokens import check_rows, template_file
from pipeline.data import templates
from pipeline.engine import gather_state, on_main
from pipeline.errors import UserError
from pipeline.handoff import Baton
from pipeline.model import load
from pipeline.stage import Context

TASKS: dict[str, str] = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}
Kind = Literal["causal", "classifier"]


def tokenizer(context: Context, baton: Baton | None) -> Any:
    """The tokenizer of a stage: its parent's, else the base's with the recipe's chat template and added tokens.

    Raises UserError where the stage's method does not train the embeddings of tokens that were added, and where a reply ends
    with a token in training that the parent's published model does not stop on.
    """
    block = context.block
    told = str(baton.path) if baton else context.base
    tok = load.tokenizer(told, block.base.revision, trust=block.base.trust_remote_code)
    if baton is None:
        name = template_file(context.recipe, context.stage) or block.base.chat_template
        templates.put(tok, None if name is None else str(name), block.base.add_tokens)
    else:
        _check_stops(tok, baton)
    if added := templates.added(tok):
        check_rows(context.recipe, context.stage, tok.convert_ids_to_tokens(added))
    return tok


def _check_stops(tok: Any, baton: Baton) -> None:
    file = baton.path / "generation_config.json"
    if not file.is_file():
        return  # a reward model says nothing
    written = GenerationConfig.from_pretrained(baton.path)  # nosec B615 # a folder
    stops = load.listed(written.eos_token_id)
    ends = {tok.eos_token_id, *load.turn_ends(tok)} - set(stops)
    if ends:
        raise UserError(
            str(file),
            f"training ends a reply with {tok.convert_ids_to_tokens(min(ends))}, and generation stops on "
            + ", ".join(tok.convert_ids_to_tokens(stops)),
            expected="every token that ends a reply among those that generation stops on",
            fix=f"run stage {baton.manifest['stage']} again",
        )


def base_below(context: Context, baton: Baton | None, kind: Kind, *, whole: bool = False) -> tuple[Base, Baton | None]:
    """(the weights to build on, adapter baton to continue or None).

    A parent's adapter of the same method and shape is continued on its own base; any other adapter (with `whole`, every one)
    is first written out as a full model in `<stage>/base-of-<parent>-<content hash>`, because adapters never stack.
    """
    block = context.block
    if baton is None:
        return block.base.model_copy(update={"model": context.base}), None
    if not baton.is_adapter:
        return block.base.model_copy(update={"model": str(baton.path), "revision": None}), None
    baton.check_base()
    if not whole and block.adapter.continues(baton.adapter):
        record = baton.manifest["base"]
        return block.base.model_copy(update={"model": record["model"], "revision": record["revision"]}), baton
    target = context.dir / f"base-of-{baton.manifest['stage']}-{baton.content_hash[:12]}"
    kept = "causal" if block.kind == "classify" else kind  # a policy has no head of its classes yet
    kept = "classifier" if baton.manifest["kind"] == "reward" else kept

    def write_out() -> None:
        if not target.is_dir():
            fresh = target.with_name(target.name + ".writing")
            shutil.rmtree(fresh, ignore_errors=True)
            load.materialise(block.base, baton, fresh, kind=kept)
            os.rename(fresh, target)

    on_main(write_out)
    return block.base.model_copy(update={"model": str(target), "revision": None}), None


def model(
    context: Context,
    baton: Baton | None,
    tok: Any,
    kind: Kind,
    *,
    sharded: bool,
    steps: int,
    longest: int,
    labels: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """The model a stage trains for `steps` optimizer steps on texts of up to `longest` tokens, adapter attached, and the
    manifest's record of its base. `labels` are a classifier's classes."""
    block = context.block
    below, adapter = base_below(context, baton, kind)
    if kind == "causal":
        base = load.causal(below, tok, sharded=sharded)
    else:
        base = load.classifier(below, tok, sharded=sharded, labels=labels)
    record = base_record(below)
    _check_context(context, base, longest)
    if block.adapter.is_full:
        return base, record
    peft = build.attach(base, block.adapter, TASKS[kind], steps=steps, tokens=templates.added(tok))
    if adapter is not None:
        weights, head = build.read(adapter.path)
        build.put(peft, "default", weights)
        if head and kind == "classifier":
            build.put_head(peft, "default", head)
    return peft, record


def _check_context(context: Context, model: Any, longest: int) -> None:
    """Refuse texts that with an adapter's virtual tokens before them are longer than the model's context."""
    block = context.block
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = block.adapter.num_virtual_tokens if METHODS[block.adapter.method].prefixed else 0
    if virtual and limit is not None and longest + virtual > limit:
        raise UserError(
            context.recipe.where("stages", context.stage, "max_length"),
            f"a text of {longest} tokens, and {virtual} virtual ones before it; the model's context holds {limit}",
            fix=f"write `max_length: {limit - virtual}`",
        )


def base_record(base: Base) -> dict[str, Any]:
    """What a manifest says of the weights below a stage's output."""
    return {
        "model": base.model,
        "revision": base.revision,
        "content_hash": handoff.model_hash(base.model, base.revision),
        "quantization": base.quantization,
    }


def writer(
    model: Any,
    tok: Any,
    base: dict[str, Any],
    adapter: str = "default",
    instead: dict[str, torch.Tensor] | None = None,
) -> Callable[[Path], None]:
    """Gather what the stage trained (collective under ZeRO-3) and return the function that writes it into a folder.

    `instead` holds weights, by the model's own names, to write in place of the model's.
    """
    peft = isinstance(model, PeftModel)
    state = gather_state((n, p) for n, p in model.named_parameters() if not peft or build.belongs(n, adapter))
    state |= dict(build.factors(model, adapter)) if peft else {}
    state |= {name: weights.to(state[name].dtype) for name, weights in (instead or {}).items()}

    def write(folder: Path) -> None:
        inner = model.get_base_model() if peft else model
        if peft:
            build.write(model, adapter, state, folder, base["model"])
        else:
            inner.save_pretrained(folder, state_dict=state)
        if getattr(inner, "generation_config", None) is not None:
            inner.generation_config.save_pretrained(folder)
        tok.save_pretrained(folder)

    return write
