"""Preference optimisation without a reward model: `dpo` on chosen/rejected pairs, `kto` on replies labelled good or bad.

Reads the base model (or a policy named by `init`, usually of sft) and its rows; hands on a policy as sft does. The reference
is the policy as the stage starts: its log-probabilities of the rows are read before training, saved, and found again by a
resume and by another loss. SimPO, CPO and ORPO know no reference. It samples nothing and needs no reward stage.

    deepspeed --num_gpus 2 --module stages.preference --recipe dpo.yaml --stage dpo --run-dir runs/dpo
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow.compute as arrow
from datasets import Dataset
from trl import DPOConfig, KTOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from pipeline import engine, trainer
from pipeline.config.preference import REFERENCE_FREE, Dpo, Kto
from pipeline.data import encoded
from pipeline.data.encoded import Encoded
from pipeline.model import begin
from pipeline.stage import Context, main
from stages.preference import reference
from stages.preference.reference import Reference, Rows
from stages.preference.trainers import PairTrainer, ReferenceFreeTrainer, ReplyTrainer, prepare


def preference(context: Context) -> None:
    """Preference optimisation without a reward model: DPO and its kin on pairs, KTO on labelled replies."""
    block, parent = cast(Dpo | Kto, context.block), context.parent("init")
    way = PAIRS if isinstance(block, Dpo) else REPLIES
    engine.start(block.seed, context.recipe.header.deterministic)

    tok = begin.tokenizer(context, parent)
    data = way.encode(context, tok, block.max_length)

    steps, kept = trainer.whole_batches(context, block, len(data.train), len(data.held_out))
    arguments = way.arguments(block, trainer.arguments(context, block, steps))
    start = trainer.ready(context, arguments, parent, tok, "causal", longest(data, way.replies))
    prepare(start.model, arguments)

    micro = arguments.per_device_train_batch_size
    parts = way.rows(block, data.train.select(range(kept)), evaluated(data, arguments, block.eval_rows), micro)
    collate = way.collator(tok.pad_token_id)
    if block.loss not in REFERENCE_FREE:
        said = Reference(context, block, parent, start.base, data, micro)
        for part, rows in parts.items():
            found = said.log_probs(start.model, arguments.deepspeed, part, rows, collate, way.read)
            parts[part] = rows.beside(way.columns, found)

    with context.tracker(steps, start.step) as tracker:
        training = way.trainer(
            model=start.model,
            args=arguments,
            block=block,
            train_dataset=parts["train"],
            eval_dataset=parts.get("held_out"),
            data_collator=collate,
            processing_class=tok,
            **trainer.hooks(context, block, start, tracker),
        )
        trainer.train(context, training, start)
        metrics = {}
        if "held_out" in parts:
            metrics = held_out_metrics(training.evaluate())
            tracker.log(steps, metrics)

    write = begin.writer(training.model, tok, start.base)
    trainer.publish(context, start, write, metrics, data.counts)


@dataclass(frozen=True)
class Way:
    """What learning from pairs and from labelled replies have each its own: how rows are encoded, which of their columns are
    replies, and what is read of the reference into which columns."""

    encode: Callable[[Context, Any, int], Encoded]
    replies: tuple[str, ...]
    arguments: Callable[[Any, dict[str, Any]], Any]
    rows: Callable[[Any, Dataset, Dataset, int], dict[str, Rows]]
    collator: Callable[[int], Any]
    read: reference.Read
    columns: tuple[str, ...]
    trainer: Callable[..., Any]


def pair_arguments(block: Dpo, shared: dict[str, Any]) -> DPOConfig:
    """TRL's arguments. Its sigmoid loss knows no label smoothing, which conservative DPO is (Mitchell 2023):
    (1 - e) L(+) + e L(-). That is its robust loss, ((1 - r) L(+) - r L(-)) / (1 - 2 r), at r = -e / (1 - 2 e)."""
    loss, smoothing = block.loss, block.label_smoothing
    if loss == "sigmoid" and smoothing:
        loss, smoothing = "robust", -smoothing / (1.0 - 2.0 * smoothing)
    known = "sigmoid" if loss in REFERENCE_FREE else loss
    return DPOConfig(max_length=None, beta=block.beta, loss_type=[known], label_smoothing=smoothing, **shared)


def reply_arguments(block: Kto, shared: dict[str, Any]) -> KTOConfig:
    return KTOConfig(
        max_length=None,
        beta=block.beta,
        loss_type=block.loss,
        desirable_weight=block.desirable_weight,
        undesirable_weight=block.undesirable_weight,
        train_sampling_strategy="sequential",  # a row's partner for the KL term is in its micro-batch
        **shared,
    )


def pair_rows(block: Dpo, train: Dataset, held_out: Dataset, micro: int) -> dict[str, Rows]:
    parts = {"train": train, "held_out": held_out}
    return {part: Rows(rows, {}) for part, rows in parts.items() if len(rows)}


def reply_rows(block: Kto, train: Dataset, held_out: Dataset, micro: int) -> dict[str, Rows]:
    """Training rows in an order by the seed, and the partner of each for the KL term where the loss has one."""
    parts = {"train": train.select(np.random.default_rng(block.seed).permutation(len(train))), "held_out": held_out}
    return {
        part: Rows(rows, {}, reference.partners(len(rows), micro) if block.loss == "kto" else None)
        for part, rows in parts.items()
        if len(rows)
    }


def pair_trainer(block: Dpo, **given: Any) -> PairTrainer:
    return ReferenceFreeTrainer(block=block, **given) if block.loss in REFERENCE_FREE else PairTrainer(**given)


def reply_trainer(block: Kto, **given: Any) -> ReplyTrainer:
    return ReplyTrainer(**given)


def longest(data: Encoded, replies: tuple[str, ...]) -> int:
    """Tokens of the longest prompt and reply."""
    found = [0]
    for rows in (data.train, data.held_out):
        if len(rows):
            prompts = arrow.list_value_length(rows.data.column("prompt_ids"))
            both = [arrow.add(prompts, arrow.list_value_length(rows.data.column(name))) for name in replies]
            found += [arrow.max(lengths).as_py() for lengths in both]
    return max(found)


def evaluated(data: Encoded, arguments: Any, most: int) -> Dataset:
    """The first held-out rows, up to `most`, in whole batches over all ranks: TRL's means would count the rows that fill the
    last one up. Fewer rows than one batch are taken as they are."""
    count, batch = min(len(data.held_out), most), arguments.per_device_eval_batch_size * arguments.world_size
    return data.held_out.select(range(count // batch * batch or count))


def held_out_metrics(said: dict[str, float]) -> dict[str, float]:
    """TRL's evaluation under `held_out/`: the loss, the implicit rewards and the log-probabilities."""
    kept = ("loss", "rewards/", "logps/", "kl", "nll_loss")
    named = {name.removeprefix("eval_"): float(value) for name, value in said.items()}
    return {f"held_out/{name}": value for name, value in named.items() if name.startswith(kept)}


PAIRS = Way(
    encoded.pairs,
    ("chosen_ids", "rejected_ids"),
    pair_arguments,
    pair_rows,
    DataCollatorForPreference,
    reference.of_pairs,
    ("ref_chosen_logps", "ref_rejected_logps"),
    pair_trainer,
)
REPLIES = Way(
    encoded.labelled,
    ("completion_ids",),
    reply_arguments,
    reply_rows,
    DataCollatorForUnpairedPreference,
    reference.of_replies,
    ("ref_logps", "ref_KL_logps"),
    reply_trainer,
)


if __name__ == "__main__":
    main(preference)
