"""What the policies of a run can do, one after the other, and what each has lost since the first and since the one before."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import torch

from pipeline.config.evaluate import Evaluate, Forgetting
from pipeline.errors import Trouble
from pipeline.model import begin
from pipeline.model.assemble import assemble
from pipeline.stage import Context
from stages.by_source import perplexity
from stages.evaluate import subject
from stages.evaluate.measure import Measure, change
from stages.evaluate.reader import Reader
from stages.evaluate.results import Results

TABLE = "forgetting.jsonl"
Row = dict[str, Any]


class Suite(Protocol):
    """What can be measured of a policy; made before a weight is read, so that mistakes in files are told at once."""

    def measure(self, reader: Reader) -> list[Measure]: ...


def compare(context: Context, block: Evaluate, asked: Forgetting, device: torch.device) -> Results:
    """Every measure of every policy, and how it changed. Collective. Raises Trouble, with all that was measured kept, when one
    has lost more than `max_loss` allows."""
    batons = [subject.baton(context, policy) for policy in asked.of]
    tok = begin.tokenizer(context, next((baton for baton in batons if baton is not None), None))
    suites = made(context, asked, tok)

    subjects = {f"subject{number}": policy for number, policy in enumerate(asked.of)}
    parts = {role: subject.part(context, policy, tok) for role, policy in subjects.items()}
    roles = assemble(context, parts, tok, sharded=False).to(device)
    found: dict[str, list[Measure]] = {}
    for role, policy in subjects.items():
        reader = Reader(context, roles, role, subject.identity(context, policy), tok, block.micro_batch)
        found[policy.name] = [measure for suite in suites.values() for measure in suite.measure(reader)]

    table = changes(found, block.seed)
    check_losses(context, asked, table)
    counts = {f"forgetting.{name}.data": suite.counts for name, suite in suites.items() if hasattr(suite, "counts")}
    counts["forgetting"] = {path: Counter() for path in asked.files}
    return Results(metrics(found, table), {TABLE: table}, counts)


def made(context: Context, asked: Forgetting, tok: Any) -> dict[str, Any]:
    """The suites that are asked for, by name. lm_eval takes a second to import, and is where it is needed."""
    from stages.evaluate import harness, suites

    found: dict[str, Any] = {}
    if asked.perplexity:
        found["perplexity"] = suites.PerplexitySuite(context, asked.perplexity, tok)
    if asked.continuation:
        found["continuation"] = suites.ContinuationSuite(context, asked.continuation, tok)
    if asked.translation:
        found["translation"] = suites.TranslationSuite(context, asked.translation)
    if asked.code:
        found["code"] = suites.CodeSuite(context, asked.code)
    if asked.truthfulqa:
        found["truthfulqa"] = harness.TruthfulQaSuite(context, asked.truthfulqa)
    if asked.gsm8k:
        found["gsm8k"] = harness.Gsm8kSuite(context, asked.gsm8k)
    if asked.tasks:
        found["tasks"] = harness.TasksSuite(context, asked.tasks)
    return found


def changes(found: dict[str, list[Measure]], seed: int) -> list[Row]:
    """A row for every measure of every policy but the first, since the first and since the one before it."""
    names = list(found)
    rows = []
    for place, name in enumerate(names[1:], 1):
        for since in dict.fromkeys((names[0], names[place - 1])):
            for before, after in zip(found[since], found[name], strict=True):
                how = change(before, after, seed)
                rows.append(
                    {
                        "measure": after.name,
                        "since": since,
                        "policy": name,
                        "before": how.before,
                        "after": how.after,
                        "change": how.value,
                        "low": how.low,
                        "high": how.high,
                        "verdict": how.verdict,
                        "higher_is_better": after.higher_is_better,
                        "rows": len(after.rows),
                    }
                )
    return rows


def metrics(found: dict[str, list[Measure]], table: list[Row]) -> dict[str, float]:
    """`<measure>/<policy>` for all of them, and `<measure>/<policy>/change` since the first with its interval's ends."""
    values = {f"{m.name}/{policy}": m.value for policy, measures in found.items() for m in measures}
    losses = {name: value for name, value in values.items() if name.startswith("perplexity/loss/")}
    values |= {name.replace("loss", "perplexity", 1): perplexity(value) for name, value in losses.items()}
    first = next(iter(found))
    for row in table:
        if row["since"] == first:
            name = f"{row['measure']}/{row['policy']}/change"
            values |= {name: row["change"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    return values


def check_losses(context: Context, asked: Forgetting, table: list[Row]) -> None:
    """Raise Trouble where a policy has lost more than it may since the first."""
    over = []
    for row in table:
        most = asked.max_loss.get(row["measure"])
        lost = -row["change"] if row["higher_is_better"] else row["change"]
        if row["since"] == asked.of[0].name and most is not None and row["verdict"] in ("kept", "lost") and lost > most:
            over.append(
                f"{row['policy']} lost {lost:.4g} of {row['measure']} (from {row['before']:.4g} to {row['after']:.4g}), "
                f"and max_loss allows {most:g}"
            )
    if over:
        raise Trouble(f"stage {context.stage}: " + "; ".join(over) + ". What was measured is kept.")
