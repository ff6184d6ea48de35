"""The policy of a stage as a full model that needs nothing else.

Reads a policy, an adapter or a full model; hands on a `save_pretrained` folder with its tokenizer: 4-bit weights dequantised,
the adapter merged in float32, rounded to `dtype`. It trains nothing and runs in one process; it does not quantise and does not
convert to other formats; `relay export` writes a stage out for other programs.

    deepspeed --num_gpus 1 --module stages.export --recipe r.yaml --stage export --run-dir runs/r
"""

from __future__ import annotations

from typing import cast

from pipeline.config.export import Export
from pipeline.export import model
from pipeline.stage import Context, main


def export(context: Context) -> None:
    """The policy of a stage as a full model."""
    if not context.is_main:
        return
    block = cast(Export, context.block)
    baton = context.batons[block.policy]
    baton.check_base()

    record = baton.manifest["base"]
    context.publish(
        lambda folder: model.full(baton, folder, dtype=block.dtype or block.base.dtype),
        base=record,
        method="full",
        metrics={},
        counts={},
        zero_stage=0,
    )


if __name__ == "__main__":
    main(export)
