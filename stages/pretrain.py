"""Continued pre-training on plain text: next-token cross-entropy on every token of every document (domain adaptation).

Reads the base model (or an earlier stage named by `init`) and rows of plain text; hands on a policy: a LoRA adapter or a full
model. Documents end with EOS, long ones are cut into pieces, and pieces share sequences without seeing each other. Perplexity
on held-out documents of the domain and on a general text is measured before and after. It does not add words to the
tokenizer's vocabulary.

    deepspeed --num_gpus 2 --module stages.pretrain --recipe domain --stage pretrain --run-dir runs/domain
"""

from __future__ import annotations

import json
from typing import Any, cast

from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipeline import engine, trainer
from pipeline.config.fitting import can_pack
from pipeline.config.pretrain import Pretrain
from pipeline.data import packed
from pipeline.data.documents import pieces
from pipeline.data.encoded import Encoded, documents
from pipeline.errors import UserError
from pipeline.handoff import Baton, write_json
from pipeline.model import begin
from pipeline.stage import Context, main
from stages.by_source import BySource
from stages.packed_trainer import PackedTrainer

BEFORE = "before.json"


def pretrain(context: Context) -> None:
    """Continued pre-training on plain text."""
    block, parent = cast(Pretrain, context.block), context.parent("init")
    engine.start(block.seed, context.recipe.header.deterministic)

    tok = begin.tokenizer(context, parent)
    domain = pieces(context, documents(context, tok), block.max_length)
    general = pieces(context, documents(context, tok, "general"), block.max_length) if block.general else None
    packs = can_pack(block, family(context, parent))
    rows = packed.packed(context, domain, block.max_length) if packs else domain.train
    held_out, places = measured(domain, general, block.eval_rows)
    own = held_out.select(places.get("domain", []))

    steps, kept = trainer.whole_batches(context, block, len(rows), len(own))
    arguments = SFTConfig(max_length=None, **trainer.arguments(context, block, steps))
    longest = max(domain.longest, general.longest if general else 0)
    start = trainer.ready(context, arguments, parent, tok, "causal", longest)

    with context.tracker(steps, start.step) as tracker:
        training = (PackedTrainer if packs else SFTTrainer)(
            model=start.model,
            args=arguments,
            train_dataset=rows.select(range(kept)),
            eval_dataset=own if len(own) else None,
            data_collator=packed.Collator(tok.pad_token_id) if packs else None,
            processing_class=tok,
            **trainer.hooks(context, block, start, tracker),
        )
        texts = BySource(training, held_out, places, tracker)
        training.add_callback(texts)
        training.add_callback(Before(context, texts))
        trainer.train(context, training, start)
        metrics = texts.measure()
        tracker.log(steps, metrics)

    metrics |= json.loads((context.checkpoints / BEFORE).read_text(encoding="utf-8"))
    metrics |= {"pieces": float(len(domain.train)), "sequences": float(len(rows))}
    write = begin.writer(training.model, tok, start.base)
    others = {"general": general.counts} if general else None
    trainer.publish(context, start, write, metrics, domain.counts, others)


class Before(TrainerCallback):
    """Measures perplexity before the first step. The numbers lie beside the checkpoints, so that a resume has them."""

    def __init__(self, context: Context, texts: BySource) -> None:
        self.file, self.texts, self.stage = context.checkpoints / BEFORE, texts, context.stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if engine.agreed(self.file.exists()):
            return
        if state.global_step:
            raise UserError(
                str(self.file),
                "missing, beside a checkpoint that was saved after it",
                fix=f"run the stage from its start: relay run RECIPE --from {self.stage}",
            )
        found = {f"before/{name}": value for name, value in self.texts.measure().items()}
        self.texts.tracker.log(0, found)
        engine.on_main(lambda: write_json(self.file, found))


def family(context: Context, parent: Baton | None) -> str:
    """The model_type of the weights that the stage builds on."""
    base = context.block.base
    model = parent.base if parent else context.base
    revision = (
        parent.manifest["base"]["revision"] if parent and parent.is_adapter else None if parent else base.revision
    )
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=base.trust_remote_code)
    return str(config.get_text_config().model_type)


def measured(domain: Encoded, general: Encoded | None, most: int) -> tuple[Dataset, dict[str, list[int]]]:
    """(held-out pieces of the domain and of the general text, the places of each text's in them): at most `most` of a text,
    and where the domain has several sources also each source's."""
    found: list[Dataset] = []
    places: dict[str, list[int]] = {}
    for name, data in (("domain", domain), ("general", general)):
        if data is not None and len(data.held_out):
            start, count = sum(map(len, found)), min(len(data.held_out), most)
            found.append(data.held_out.select(range(count)))
            places[name] = list(range(start, start + count))
    places |= {f"domain/{name}": of for name, of in domain.held_out_by_source(most).items()}
    return concatenate_datasets(found) if found else domain.held_out, places


if __name__ == "__main__":
    main(pretrain)
