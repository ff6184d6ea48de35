"""Supervised fine-tuning: next-token cross-entropy on demonstrations.

Reads the base model (or an earlier stage named by `init`) and prompt/completion rows; hands on a policy: a LoRA adapter or
a full model. Loss is taken on the completion and its EOS only, unless `loss_on: all`. It does not pack sequences.

    deepspeed --num_gpus 2 --module stages.sft --recipe quickstart --stage sft --run-dir runs/quickstart
"""

from __future__ import annotations

import math
from typing import cast

from trl import SFTConfig, SFTTrainer

from pipeline import checkpoint, engine, trainer
from pipeline.adapters import adalora, lora_plus
from pipeline.config.schema import Sft
from pipeline.data.encoded import demonstrations
from pipeline.model import begin
from pipeline.model.load import tokenizer
from pipeline.stage import Context, main


def sft(context: Context) -> None:
    """Supervised fine-tuning."""
    block, parent = cast(Sft, context.block), context.parent("init")
    engine.start(block.seed)

    tok = tokenizer(str(parent.path) if parent else context.base, block.base.revision)
    data = demonstrations(context, tok, block.max_length, block.loss_on)
    held_out = data.held_out.select(range(min(len(data.held_out), block.eval_rows)))

    steps, kept = trainer.whole_batches(context, block, len(data.train), len(held_out))
    arguments = SFTConfig(max_length=None, **trainer.arguments(context, block, steps))
    zero = engine.zero_stage(arguments.deepspeed)
    model, base = begin.model(context, parent, tok, "causal", sharded=zero == 3, steps=steps, longest=data.longest)
    allocation = adalora.Allocation(model) if block.adapter.method == "adalora" else None
    engine.fit_buckets(arguments.hf_deepspeed_config.config, model)
    resume = engine.agreed(checkpoint.newest(context.checkpoints) if context.is_main else None)

    with context.tracker(steps, checkpoint.step_of(resume) if resume else 0) as tracker:
        training = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train.select(range(kept)),
            eval_dataset=held_out if len(held_out) else None,
            processing_class=tok,
            callbacks=trainer.callbacks(context, block, tracker, allocation),
            **lora_plus.for_trainer(model, block.adapter, block),
        )
        trainer.train(context, training, resume)
        metrics = {}
        if len(held_out):
            loss = training.evaluate()["eval_loss"]
            metrics = {"held_out/loss": loss, "held_out/perplexity": math.exp(min(loss, 50.0))}
            tracker.log(steps, metrics)

    write = begin.writer(training.model, tok, base)
    context.publish(write, base=base, method=block.adapter.method, metrics=metrics, counts=data.counts, zero_stage=zero)


if __name__ == "__main__":
    main(sft)
