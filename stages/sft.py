"""Supervised fine-tuning: next-token cross-entropy on demonstrations.

Reads the base model (or an earlier stage named by `init`) and prompt/completion rows; hands on a policy: a LoRA adapter or
a full model. Loss is taken on the completion and its EOS only, unless `loss_on: all`. With `packing` several rows share a
sequence and none sees another. It does not learn from images.

    deepspeed --num_gpus 2 --module stages.sft --recipe quickstart --stage sft --run-dir runs/quickstart
"""

from __future__ import annotations

from typing import cast

from trl import SFTConfig, SFTTrainer

from pipeline import engine, trainer
from pipeline.config.fitting import check_packing
from pipeline.config.schema import Sft
from pipeline.data import packed
from pipeline.data.encoded import demonstrations
from pipeline.model import begin
from pipeline.stage import Context, main
from stages.by_source import BySource, perplexity
from stages.packed_trainer import PackedTrainer


def sft(context: Context) -> None:
    """Supervised fine-tuning."""
    block, parent = cast(Sft, context.block), context.parent("init")
    engine.start(block.seed, context.recipe.header.deterministic)

    tok = begin.tokenizer(context, parent)
    data = demonstrations(context, tok, block.max_length, block.loss_on)
    rows = packed.packed(context, data, block.max_length) if block.packing else data.train
    held_out = data.held_out.select(range(min(len(data.held_out), block.eval_rows)))

    steps, kept = trainer.whole_batches(context, block, len(rows), len(held_out))
    arguments = SFTConfig(max_length=None, **trainer.arguments(context, block, steps))
    start = trainer.ready(context, arguments, parent, tok, "causal", data.longest)
    if block.packing:
        check_packing(context.recipe, context.stage, start.model.config.get_text_config().model_type)

    with context.tracker(steps, start.step) as tracker:
        training = (PackedTrainer if block.packing else SFTTrainer)(
            model=start.model,
            args=arguments,
            train_dataset=rows.select(range(kept)),
            eval_dataset=held_out if len(held_out) else None,
            data_collator=packed.Collator(tok.pad_token_id) if block.packing else None,
            processing_class=tok,
            **trainer.hooks(context, block, start, tracker),
        )
        by_source = BySource(training, held_out, data.held_out_by_source(len(held_out)), tracker)
        training.add_callback(by_source)
        trainer.train(context, training, start)
        metrics = {}
        if len(held_out):
            loss = training.evaluate()["eval_loss"]
            metrics = {"held_out/loss": loss, "held_out/perplexity": perplexity(loss)}
            tracker.log(steps, metrics)
            metrics |= by_source.metrics

    write = begin.writer(training.model, tok, start.base)
    trainer.publish(context, start, write, metrics, data.counts)


if __name__ == "__main__":
    main(sft)
