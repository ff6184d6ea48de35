"""Benchmarks of lm_eval, EleutherAI's harness (Gao et al. 2024, doi 10.5281/zenodo.12608602), on a policy of the run.

The harness makes the prompts and the metrics; the policy answers through `Reader`, so that its answers are kept, and come from
all ranks. TruthfulQA and GSM8K are the harness's own tasks on local files.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from pipeline import engine
from pipeline.config.evaluate import Gsm8k, Task, TruthfulQa
from pipeline.config.schema import Sampling
from pipeline.errors import UserError
from pipeline.stage import Context
from stages.evaluate.files import texts
from stages.evaluate.measure import Floats, Measure, mean, ratio
from stages.evaluate.reader import Reader

OWN_TASKS = Path(lm_eval.__file__).parent / "tasks"
NEVER = -1e9
"""Log-likelihood of a choice that is not taken."""


class Harness(LM):
    """A policy as the harness asks it. Every rank asks for everything; `Reader` divides the work."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.reader.likelihoods([self.reader.apart(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihoods of whole texts, in windows that fit the model; every token is a target once."""
        reader, windows, of = self.reader, [], []
        for number, request in enumerate(requests):
            ids = [*reader.opening, *reader.ids(request.args[0])]
            step = reader.context_length - 1
            for start in range(0, len(ids) - 1, step):
                windows.append((ids[start : start + 1], ids[start + 1 : start + 1 + step]))
                of.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(of, reader.likelihoods(windows), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy replies, cut where the first of the request's `until` stands."""
        found = [""] * len(requests)
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_length[int(request.args[1].get("max_gen_toks", 256))].append(number)
        for longest, numbers in by_length.items():
            sampling = Sampling(max_response_length=longest, batch=self.reader.size)
            prompts = [self.reader.ids(requests[number].args[0]) for number in numbers]
            for number, reply in zip(numbers, self.reader.replies(prompts, sampling), strict=True):
                found[number] = cut(reply, requests[number].args[1].get("until") or [])
        return found


def cut(reply: str, until: str | list[str]) -> str:
    """`reply` up to the first of the strings `until`."""
    for stop in [until] if isinstance(until, str) else until:
        reply = reply.split(stop)[0] if stop else reply
    return reply


COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
"""Of TruthfulQA's file."""


class TruthfulQaSuite:
    """The harness's `truthfulqa_mc1` and `truthfulqa_mc2` on TruthfulQA's own CSV file."""

    def __init__(self, context: Context, block: TruthfulQa) -> None:
        where = context.recipe.where("stages", context.stage, "forgetting", "truthfulqa")
        questions = texts(context.recipe.data(block.path), COLUMNS, where)
        local = {"validation": [question(row) for row in questions[: block.rows]]}
        self.tasks = {mc: own_task("truthfulqa", f"truthfulqa_{mc}", local) for mc in ("mc1", "mc2")}

    def measure(self, reader: Reader) -> list[Measure]:
        return [
            measure
            for mc, task in self.tasks.items()
            for measure in run(reader, task, {"acc": f"truthfulqa/{mc}"}, rows=None)
        ]


def question(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the harness reads it from the hub: MC1 has the best answer and the wrong ones, MC2 all right ones."""
    right, wrong = (answers(row[f"{which} Answers"]) for which in ("Correct", "Incorrect"))
    best = row["Best Answer"].strip()
    return {
        "question": row["Question"].strip(),
        "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
        "mc2_targets": {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)},
    }


def answers(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


class Gsm8kSuite:
    """The harness's `gsm8k` on local files, its strict match: the number after `####`."""

    def __init__(self, context: Context, block: Gsm8k) -> None:
        where = context.recipe.where("stages", context.stage, "forgetting", "gsm8k")
        columns = ("question", "answer")
        local = {"test": texts(context.recipe.data(block.path), columns, where)}
        local["train"] = texts(context.recipe.data(block.train), columns, where) if block.train else local["test"][:1]
        more = {
            "num_fewshot": block.shots,
            "generation_kwargs": {"until": ["Question:"], "max_gen_toks": block.max_response_length},
        }
        self.block, self.task = block, own_task("gsm8k", "gsm8k", local, **more)

    def measure(self, reader: Reader) -> list[Measure]:
        return run(reader, self.task, {"exact_match,strict-match": "gsm8k/exact_match"}, rows=self.block.rows)


class TasksSuite:
    """Tasks of the harness, by name or by file."""

    def __init__(self, context: Context, blocks: list[Task]) -> None:
        self.tasks: list[tuple[Task, Any]] = []
        for number, block in enumerate(blocks):
            where = context.recipe.where("stages", context.stage, "forgetting", "tasks", str(number))
            given = block.name or context.recipe.data(str(block.path))
            try:  # its index of its own tasks takes seconds to make
                loaded = TaskManager(include_defaults=block.path is None).load([given])["tasks"]
            except Exception as error:  # a task file, and what it imports, may fail in any way
                found = f"lm_eval cannot load {given}: {type(error).__name__}: {error}"
                raise UserError(where, found, fix="check the name with `lm_eval ls tasks`, or the file") from error
            for task in loaded.values():
                task.set_config(key="num_fewshot", value=block.shots or task.get_config("num_fewshot") or 0)
                self.tasks.append((block, task))

    def measure(self, reader: Reader) -> list[Measure]:
        return [found for block, task in self.tasks for found in run(reader, task, None, rows=block.rows)]


def own_task(folder: str, name: str, data: dict[str, list[dict[str, Any]]], **changes: Any) -> Any:
    """One of the harness's own tasks, on local rows by split."""
    config = load_yaml(OWN_TASKS / folder / f"{name}.yaml", resolve_func=True)
    splits = {split: Dataset.from_list(found) for split, found in data.items()}
    config |= {**changes, "custom_dataset": lambda **_: splits, "metadata": {}}
    return ConfigurableTask(config=config)


def run(reader: Reader, task: Any, names: dict[str, str] | None, rows: int | None) -> list[Measure]:
    """The task's metrics that are numbers for each row, or losses over words or bytes, with what guessing would give.

    `names` picks metrics and says what they are called; without, all are there, as `tasks/<task>/<metric>`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task.set_fewshot_seed(seed=1234)
    name = task.config.task
    found = evaluate(Harness(reader), {"tasks": {name: task}}, limit=rows, bootstrap_iters=0)
    samples: list[dict[str, Any]] = engine.agreed(found and found["samples"][name])
    by_filter: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    measures = []
    for chosen, of_filter in by_filter.items():
        of_filter.sort(key=lambda sample: int(sample["doc_id"]))
        guessed = guesses(task, of_filter)
        for metric, better in task.higher_is_better().items():
            label = metric if chosen == "none" else f"{metric},{chosen}"
            called = f"tasks/{name}/{label}" if names is None else names.get(label)
            measure = called and of_metric(called, [sample.get(metric) for sample in of_filter], metric)
            if not measure:
                continue
            chance = np.array([[guess[metric], 1.0] for guess in guessed]) if guessed else None
            measures.append(Measure(measure.name, measure.rows, measure.score, better, chance))
    return measures


LOSSES: dict[str, Callable[[Floats], Floats]] = {
    "word_perplexity": lambda sums: np.exp(-ratio(sums)),
    "byte_perplexity": lambda sums: np.exp(-ratio(sums)),
    "bits_per_byte": lambda sums: -ratio(sums) / math.log(2),
}
"""Metrics whose rows are a log-likelihood and a number of words or bytes."""


def of_metric(name: str, values: list[Any], metric: str) -> Measure | None:
    """A metric's rows; None where a row has no number of its own, as the harness's corpus scores."""
    if metric in LOSSES:
        return Measure(name, np.array(values, dtype=np.float64), LOSSES[metric])
    if all(isinstance(value, (bool, int, float, np.number)) for value in values):
        return mean(name, [float(value) for value in values], [0.0] * len(values))
    return None


def guesses(task: Any, samples: list[dict[str, Any]]) -> list[dict[str, float]] | None:
    """What each row's metrics would be by guessing: a choice at random, or the reply to the next row. None where there is no
    guess: a likelihood has none."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return [_any_choice(task, sample["doc"]) for sample in samples]
    if task.OUTPUT_TYPE == "generate_until":
        others = samples[1:] + samples[:1]
        return [
            task.process_results(sample["doc"], other["filtered_resps"])
            for sample, other in zip(samples, others, strict=True)
        ]
    return None


def _any_choice(task: Any, doc: dict[str, Any]) -> dict[str, float]:
    """The mean of the metrics over the choices, each taken for sure in turn."""
    number = len(task.doc_to_choice(doc))
    taken = [
        task.process_results(doc, [(0.0 if n == choice else NEVER, n == choice) for n in range(number)])
        for choice in range(number)
    ]
    return {metric: float(np.mean([found[metric] for found in taken])) for metric in taken[0]}
