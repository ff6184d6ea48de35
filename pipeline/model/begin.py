"""What a stage starts from and what it publishes: the base or a parent's baton in, a plain model or adapter folder out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from peft import PeftModel

from pipeline import handoff
from pipeline.adapters import build
from pipeline.engine import gather_state
from pipeline.handoff import Baton
from pipeline.model import load
from pipeline.stage import Context

TASKS: dict[str, str] = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}
Kind = Literal["causal", "classifier"]


def base_below(context: Context, baton: Baton | None, kind: Kind) -> tuple[str, Baton | None]:
    """(path of the weights to build on, adapter baton to continue or None).

    A parent's adapter of the same method and shape is continued on its own base; any other adapter is first written out
    as a full model in `<stage>/base-of-<parent>`, because adapters never stack.
    """
    if baton is None:
        return context.base, None
    if not baton.is_adapter:
        return str(baton.path), None
    handoff.check_base(baton, handoff.model_hash(baton.base, baton.manifest["base"].get("revision")))
    block = context.block
    if block.adapter.method == "lora" and build.same_method(block.adapter, baton.path):
        return baton.base, baton
    target = context.dir / f"base-of-{baton.manifest['stage']}"
    if context.is_main:
        load.materialise(block.base, baton, target, kind=kind if baton.manifest["kind"] != "reward" else "classifier")
    dist.barrier()
    return str(target), None


def model(context: Context, baton: Baton | None, tok: Any, kind: Kind, *, sharded: bool) -> tuple[Any, dict[str, Any]]:
    """The model a stage trains, adapter attached, and the manifest's record of its base."""
    block = context.block
    path, adapter = base_below(context, baton, kind)
    base = (load.causal if kind == "causal" else load.classifier)(block.base, path, tok, sharded=sharded)
    record = base_record(context, path)
    if block.adapter.method == "full":
        return base, record
    peft = build.attach(base, block.adapter, TASKS[kind])
    if adapter is not None:
        weights, head = build.read(adapter.path)
        build.put(peft, "default", weights)
        if head and kind == "classifier":
            build.put_head(peft, "default", head)
    return peft, record


def base_record(context: Context, path: str) -> dict[str, Any]:
    revision = context.block.base.revision if path == context.base else None
    return {
        "model": path,
        "revision": revision,
        "content_hash": handoff.model_hash(path, revision),
        "quantization": context.block.base.quantization,
    }


def writer(model: Any, tok: Any, base: dict[str, Any], adapter: str = "default") -> Callable[[Path], None]:
    """Gather what the stage trained (collective under ZeRO-3) and return the function that writes it into a folder."""
    peft = isinstance(model, PeftModel)
    state = gather_state((n, p) for n, p in model.named_parameters() if not peft or f".{adapter}." in n)

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
