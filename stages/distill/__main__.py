"""Distillation: the student learns the teacher's next-token distributions, on the data's replies and on its own.

Reads the base model (or an earlier stage named by `init`), a teacher (an earlier stage or any model of the same vocabulary)
and prompts, with replies unless `lmbda` is 1; hands on the student: an adapter or a full model. A teacher on the student's
base takes no second copy of it. It does not learn from a teacher's texts alone: that is `sft`.

    deepspeed --num_gpus 2 --module stages.distill --recipe distill --stage distill --run-dir runs/distill
"""

from __future__ import annotations

from typing import cast

from trl import SFTConfig

from pipeline import engine, trainer
from pipeline.config.distill import Distill
from pipeline.data import encoded
from pipeline.model import begin
from pipeline.model.assemble import plain
from pipeline.model.load import eos_ids
from pipeline.stage import Context, main
from stages.by_source import perplexity
from stages.distill.pair import STUDENT, Pair
from stages.distill.teacher import check_context, taught
from stages.distill.training import Distillation


def distill(context: Context) -> None:
    """Distillation."""
    block, parent = cast(Distill, context.block), context.parent("init")
    device = engine.start(block.seed, context.recipe.header.deterministic)

    tok = begin.tokenizer(context, parent)
    longest_prompt = block.sampling.max_prompt_length if block.lmbda else None
    data = encoded.answered(context, tok, block.max_length, longest_prompt, replies=block.lmbda < 1)
    held_out = data.held_out.select(range(min(len(data.held_out), block.eval_rows)))

    steps, kept = trainer.whole_batches(context, block, len(data.train), len(held_out))
    arguments = SFTConfig(max_length=None, **trainer.arguments(context, block, steps))
    start = trainer.ready(context, arguments, parent, tok, "causal", block.longest(data.longest))
    roles = taught(context, block, start.model, start.base, tok, device)
    check_context(context, roles, block.longest(data.longest))
    pair = Pair(roles, block, tok.pad_token_id, eos_ids(plain(roles.trunks[STUDENT])), sharded=start.zero == 3)

    with context.tracker(steps, start.step) as tracker:
        training = Distillation(
            model=start.model,
            args=arguments,
            train_dataset=data.train.select(range(kept)),
            eval_dataset=held_out if len(held_out) else None,
            processing_class=tok,
            pair=pair,
            **trainer.hooks(context, block, start, tracker),
        )
        trainer.train(context, training, start)
        metrics = {}
        if len(held_out):
            found = training.evaluate()
            metrics = {"held_out/divergence": found["eval_loss"], "held_out/forward_kl": found["eval_forward_kl"]}
            if "eval_nll" in found:
                loss = found["eval_nll"]
                metrics |= {"held_out/loss": loss, "held_out/perplexity": perplexity(loss)}
            tracker.log(steps, metrics)

    write = begin.writer(training.model, tok, start.base)
    trainer.publish(context, start, write, metrics, data.counts)


if __name__ == "__main__":
    main(distill)
