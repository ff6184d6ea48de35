"""The policy of a stage as a full model that needs nothing else.

Reads a policy, an adapter or a full model; hands on a `save_pretrained` folder with its tokenizer: 4-bit weights dequantised,
the adapter merged in float32, rounded to `dtype`. It trains nothing and runs in one process; it does not quantise and does not
convert to other formats.

    deepspeed --num_gpus 1 --module stages.export --recipe r.yaml --stage export --run-dir runs/r
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from pipeline.config.export import Export
from pipeline.model import load
from pipeline.stage import Context, main


def export(context: Context) -> None:
    """The policy of a stage as a full model."""
    if not context.is_main:
        return
    block = cast(Export, context.block)
    baton = context.batons[block.policy]
    base = block.base.model_copy(update={"dtype": block.dtype or block.base.dtype})

    write: Callable[[Path], None]
    if baton.is_adapter:
        baton.check_base()

        def write(folder: Path) -> None:
            load.materialise(base, baton, folder, kind="causal")
    else:
        tok = load.tokenizer(str(baton.path), trust=base.trust_remote_code)
        held = base.model_copy(update={"model": str(baton.path), "revision": None, "quantization": None})
        model = load.causal(held, tok, sharded=False)

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tok.save_pretrained(folder)

    record = baton.manifest["base"]
    context.publish(write, base=record, method="full", metrics={}, counts={}, zero_stage=0)


if __name__ == "__main__":
    main(export)
