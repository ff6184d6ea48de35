"""One adapter out of those of several stages: their weighted sum, or what TIES or DARE leave of it.

Reads policies, of this run or of others, whose LoRA adapters stand on one base; hands on one such adapter, of the same shape
(with `cat` of the ranks' sum), on that base. It trains nothing and runs in one process; it does not combine full models or
heads.

    deepspeed --num_gpus 1 --module stages.merge --recipe r.yaml --stage merge --run-dir runs/r
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from pipeline.adapters import build
from pipeline.config.merge import Merge
from pipeline.config.schema import Base
from pipeline.errors import UserError
from pipeline.handoff import Baton
from pipeline.model import begin, load
from pipeline.stage import Context, main


def merge(context: Context) -> None:
    """One adapter out of those of several stages."""
    if not context.is_main:
        return
    block = cast(Merge, context.block)
    names = [part.name for part in block.of]
    batons = [context.batons[name] for name in names]
    base = common_base(context, batons)

    tok = load.tokenizer(str(batons[0].path), trust=block.base.trust_remote_code)
    model = with_adapters(block.base.model_copy(update=base), tok, batons)
    combine(model, block)
    hand_over(model, block)

    record = batons[0].manifest["base"]
    write = begin.writer(model, tok, record)
    metrics = {f"weight/{name}": weight for name, weight in zip(names, weights(block), strict=True)}
    context.publish(write, base=record, method=block.adapter.method, metrics=metrics, counts={}, zero_stage=0)


def common_base(context: Context, batons: list[Baton]) -> dict[str, Any]:
    """The base that all adapters stand on, whole. Raises UserError when they stand on different ones."""
    first = batons[0]
    for baton in batons:
        baton.check_base()
        ours, theirs = first.manifest["base"], baton.manifest["base"]
        same = [ours[key] == theirs[key] for key in ("content_hash", "quantization")]
        if not all(same):
            raise UserError(
                context.recipe.where("stages", context.stage, "of"),
                f"{baton.manifest['stage']} stands on {theirs['model']} and {first.manifest['stage']} on {ours['model']}"
                if not same[0]
                else "of two stages on one base, one held it in 4 bits",
                expected="adapters of one base",
                fix="let the stages start from one base, or from one stage",
            )
    record = first.manifest["base"]
    # The sum needs the layers, not what is in them.
    return {"model": record["model"], "revision": record["revision"], "quantization": None}


def with_adapters(base: Base, tok: Any, batons: list[Baton]) -> PeftModel:
    """The base with the adapter of every baton, in float32, as `0`, `1` and so on."""
    model: Any = load.causal(base, tok, sharded=False)
    for number, baton in enumerate(batons):
        if build.frozen(baton.path).trainable_token_indices:
            raise UserError(
                f"stage {baton.manifest['stage']}",
                "its adapter has rows of embeddings for added tokens, which no combination adds up",
                expected="adapters without `base.add_tokens`",
            )
        if isinstance(model, PeftModel):
            model.load_adapter(str(baton.path), str(number))
        else:
            model = PeftModel.from_pretrained(model, str(baton.path), str(number))
    return model


def weights(block: Merge) -> list[float]:
    return block.weights or [1.0] * len(block.of)


def combine(model: PeftModel, block: Merge) -> None:
    """Add the combination as adapter `combined`, whose change is the product of its factors without a scale."""
    torch.manual_seed(block.seed)  # of DARE's choice
    model.base_model.add_weighted_adapter(
        [str(number) for number in range(len(block.of))],
        weights(block),
        "combined",
        combination_type=block.combination,
        density=block.density,
    )


@torch.no_grad()
def hand_over(model: PeftModel, block: Merge) -> None:
    """Copy `combined` into an adapter of the stage's own shape and scale, so that a next stage can go on training it."""
    build.add(model, build.config(block.adapter, model.get_base_model(), "CAUSAL_LM"), "default")
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "combined" in layer.lora_A:
            layer.lora_A["default"].weight.copy_(layer.lora_A["combined"].weight)
            layer.lora_B["default"].weight.copy_(layer.lora_B["combined"].weight / layer.scaling["default"])


if __name__ == "__main__":
    main(merge)
