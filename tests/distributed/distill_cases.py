"""What warm ranks are asked to do about distillation. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def sides(recipe: str, run_dir: str, stage: str = "distill") -> dict[str, Any]:
    """A distillation's two roles before any training: whether they are one copy of the weights, and the largest difference of
    the teacher's logits to those of its published output opened by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pipeline import engine
    from pipeline import stage as stages
    from pipeline.model import begin
    from stages.distill.pair import STUDENT, TEACHER
    from stages.distill.teacher import taught

    found: dict[str, Any] = {}

    def look(context: Any) -> None:
        device = engine.start(0)
        parent = context.parent("init")
        tok = begin.tokenizer(context, parent)
        model, base = begin.model(context, parent, tok, "causal", sharded=False, steps=4, longest=48)
        roles = taught(context, context.block, model, base, tok, device).to(device).eval()
        tokens = torch.tensor([tok("Anna visits the palace. What does she see?")["input_ids"]], device=device)
        with torch.no_grad():
            said = {}
            for role in (TEACHER, STUDENT):
                states, head = roles.states(role, tokens)
                said[role] = head(states)
            baton = context.batons[context.block.teacher.stage]
            plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(baton.base), baton.path).eval()
            expected = plain(input_ids=tokens).logits
        weights = {p.data_ptr() for n, p in roles.named_parameters() if "lora" not in n}
        found.update(
            trunks=sorted(roles.trunks),
            storages=len(weights),
            base_parameters=sum("lora" not in n for n, _ in plain.named_parameters()),
            difference=float((said[TEACHER] - expected).abs().max()),
            apart=float((said[TEACHER] - said[STUDENT]).abs().max()),
            trained=sorted({n.split(".")[-2] for n, p in roles.named_parameters() if p.requires_grad}),
        )

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stages.execute(look, recipe, stage, Path(run_dir), [f"deepspeed.num_gpus={world}"], rank, world)
    return found
