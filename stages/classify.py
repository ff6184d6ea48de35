"""Sequence classifier on a task of GLUE or SuperGLUE: cross-entropy over the task's classes, squared error for stsb.

Reads the base model (or a policy named by `init`) and the task's training and validation splits, from the hub or from the
official files; hands on a classifier, its head kept with the adapter, what it said of every validation row
(`predictions.jsonl`), and the task's official metrics on the whole validation split. Texts are read at their closing EOS,
as the reward model reads them. It does not label the test splits, whose labels are the benchmarks' own.

    deepspeed --num_gpus 2 --module stages.classify --recipe glue --stage glue --run-dir runs/glue
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from pipeline import engine, trainer
from pipeline.config.glue import TASKS, Task
from pipeline.config.schema import Classify
from pipeline.data import glue
from pipeline.data.encode import Classified
from pipeline.model import begin
from pipeline.scoring.glue import predictions, score
from pipeline.stage import Context, main

PREDICTIONS = "predictions.jsonl"


def classify(context: Context) -> None:
    """Sequence classifier on a task of GLUE or SuperGLUE."""
    block, parent = cast(Classify, context.block), context.parent("init")
    engine.start(block.seed, context.recipe.header.deterministic)

    task = TASKS[block.task]
    tok = begin.tokenizer(context, parent)
    data = glue.load(context.recipe, context.stage)
    first = next(iter(data.validation.values()))[: block.eval_rows]
    steps, kept = trainer.whole_batches(context, block, len(data.train), len(first))
    rows = encoded(context, data, tok, data.train[:kept])

    arguments = TrainingArguments(**trainer.arguments(context, block, steps))
    longest = max(part.longest for part in rows.values())
    start = trainer.ready(context, arguments, parent, tok, "classifier", longest, task.labels)

    with context.tracker(steps, start.step) as tracker:
        training = Trainer(
            model=start.model,
            args=arguments,
            train_dataset=rows["train"],
            eval_dataset=Classified(tok, first, block.max_length, classes=bool(task.labels)),
            processing_class=tok,
            data_collator=DataCollatorWithPadding(tok),
            compute_loss_func=batch_loss,
            **trainer.hooks(context, block, start, tracker),
        )
        trainer.train(context, training, start)
        said = {name: training.predict(rows[name]).predictions.astype(np.float64) for name in data.validation}
        metrics = validation_metrics(task, data, said)
        tracker.log(steps, metrics)

    write = with_predictions(begin.writer(training.model, tok, start.base), task, data, said)
    trainer.publish(context, start, write, metrics, data.counts)


def encoded(context: Context, data: glue.Data, tok: Any, train: list[glue.Item]) -> dict[str, Classified]:
    """The rows of every split by its name; those that are left out of training or cut are counted."""
    block = cast(Classify, context.block)
    rows = {}
    for place in glue.places(context.recipe, context.stage):
        name, counts = place.part.name, data.counts[place.name]
        items = data.validation.get(name, train)
        rows[name] = Classified(tok, items, block.max_length, classes=bool(TASKS[block.task].labels))
        left = counts["rows"] - len(items)
        counts.update({"used": len(items), "cut": rows[name].cut} | ({"beyond whole batches": left} if left else {}))
    return rows


def batch_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """This micro-batch's part of the batch's mean loss: the Trainer counts the batch's rows over all ranks and micro-batches.

    Not the model's own loss. That is the micro-batch's mean, which the Trainer takes for such a part: it would not divide it
    by the accumulation steps, and would multiply it by the ranks.
    """
    return summed_loss(outputs.logits, labels) / num_items_in_batch


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `logits` [rows, classes], or squared error where `labels` [rows] are no classes; in float32."""
    if labels.is_floating_point():
        return torch.nn.functional.mse_loss(logits[:, 0].float(), labels.float(), reduction="sum")
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def validation_metrics(task: Task, data: glue.Data, said: dict[str, np.ndarray]) -> dict[str, float]:
    """Official metrics, loss and rows of every validation split. `said` holds its logits, float64 [rows, classes]."""
    metrics: dict[str, float] = {}
    for name, items in data.validation.items():
        found = score(task, items, said[name])
        logits, labels = torch.tensor(said[name]), torch.tensor([item.label for item in items])
        found["loss"] = float(summed_loss(logits, labels.long() if task.labels else labels)) / len(items)
        found["rows"] = float(len(items))
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    return metrics


def with_predictions(
    write: Callable[[Path], None], task: Task, data: glue.Data, said: dict[str, np.ndarray]
) -> Callable[[Path], None]:
    """`write`, and after it one JSON line for each validation row: its split, its number there from 0, its label, what was
    predicted and the logits; and what its task groups rows by."""

    def both(folder: Path) -> None:
        write(folder)
        with (folder / PREDICTIONS).open("w", encoding="utf-8") as stream:
            for name, items in data.validation.items():
                answers = predictions(task, said[name])
                for number, item in enumerate(items):
                    row = {"split": name, "row": number, "label": _word(task, item.label)}
                    row |= {"prediction": _word(task, answers[number]), "logits": said[name][number].tolist()}
                    row |= {"group": list(item.group)} if item.group else {}
                    row |= {"candidate": item.candidate, "answers": list(item.answers)} if item.answers else {}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    return both


def _word(task: Task, value: float) -> str | float:
    """A class by its name, a regression's number as it is."""
    return task.labels[int(value)] if task.labels else float(value)


if __name__ == "__main__":
    main(classify)
