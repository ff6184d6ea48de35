"""A run whose stages are published by the code that publishes, with adapters moved off their start instead of trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline import chain, handoff
from pipeline.adapters import build
from pipeline.config.recipe import load
from pipeline.model import begin
from pipeline.stage import Context
from tests.support import tiny

PROMPTS = str(tiny.QUICKSTART / "prompts.jsonl")
EVALUATED = {
    "prompts": 64.0,
    "kl": 0.25,
    "score/reward/model": 1.5,
    "score/reward/against": 0.5,
    "score/reward/win_rate": 0.75,
    "score/reward/win_rate_low": 0.625,
    "score/reward/win_rate_high": 0.875,
}


def recipe(folder: Path, **changes: Any) -> Path:
    """sft, reward, ppo and what evaluates it; `whole`, trained whole; `packed`, on a base held in 4 bits."""
    sft = {"kind": "sft", "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl")}], "lr": 1e-2, "steps": 2}
    stages: dict[str, Any] = {
        "stages__whole": {**sft, "adapter": {"method": "full"}},
        "stages__packed": {**sft, "base": {"dtype": "bf16", "quantization": "nf4"}},
        "stages__evaluate": {
            "kind": "evaluate",
            "model": "ppo",
            "against": "sft",
            "reward": ["reward"],
            "prompts": [{"path": PROMPTS}],
        },
    }
    return tiny.recipe(
        folder / "r.yaml", tiny.QUICKSTART / "base", deepspeed__num_gpus=1, name="story", **{**stages, **changes}
    )


def run(path: Path, folder: Path, stages: tuple[str, ...]) -> Path:
    """Publish `stages` of the recipe, in their order, in the run directory `folder`."""
    for stage in stages:
        publish(path, folder, stage)
    return folder


def publish(path: Path, folder: Path, stage: str, metrics: dict[str, float] | None = None) -> handoff.Baton:
    found = load(path)
    block = found.stages[stage]
    batons = {parent: handoff.open_baton(folder / parent) for parent in found.parents(stage)}
    context = Context(found, stage, folder, 0, 1, chain.inputs(found, stage, folder), batons)
    counts: Any = {source["path"]: {"rows": 90, "used": 88, "held out": 2} for source in context.inputs["data"]}
    said: dict[str, Any] = {"counts": counts, "zero_stage": 2}
    if block.kind == "evaluate":
        record = begin.base_record(block.base.model_copy(update={"model": context.base}))
        context.publish(lambda place: None, base=record, method="lora", metrics=metrics or EVALUATED, **said)
        return handoff.open_baton(folder / stage)
    kind: Any = "classifier" if block.kind == "reward" else "causal"
    parent = batons.get(str(getattr(block, "policy", getattr(block, "init", None))))
    tok = begin.tokenizer(context, parent)
    torch.manual_seed(len(stage) + block.seed)
    model, record = begin.model(context, parent, tok, kind, sharded=False, steps=1, longest=16)
    parameters = model.parameters() if block.adapter.is_full else build.trained(model, "default")
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    write = begin.writer(model, tok, record)
    context.publish(write, base=record, method=block.adapter.method, metrics=metrics or {"loss": 1.25}, **said)
    return handoff.open_baton(folder / stage)
