"""Cleaning and filtering of data before anything is trained on it.

Reads rows of any shape, from files, the hub or earlier data stages, and takes them through the recipe's steps in order; hands
on what is left as Parquet, with a report of what each step did and a list of the rows that are gone. It trains nothing, needs
no model, splits and mixes nothing. Rows are streamed: memory grows only with what duplicates are compared with. A stage that
was stopped begins anew, which costs minutes at most.

    deepspeed --num_gpus 1 --module stages.prepare --recipe data.yaml --stage clean --run-dir runs/clean
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from pipeline.config.prepare import Decontaminate, Language, Prepare
from pipeline.data.check import Rejections
from pipeline.data.decontaminate import Evaluation
from pipeline.data.language import languages
from pipeline.data.parallel import ordered
from pipeline.data.prepared import summary, write_report
from pipeline.data.read import rows
from pipeline.data.row import Bad, Row
from pipeline.data.shards import Shards, size
from pipeline.data.split import location, read_source
from pipeline.data.steps import READ, READING, Ledger, Passage, Steps
from pipeline.errors import UserError
from pipeline.stage import Context, Stopped, main

CHUNK_ROWS, CHUNK_CHARACTERS = 500, 2_000_000
"""What one process is given at a time: so many rows or characters. The same for any number of processes."""


def prepare(context: Context) -> None:
    """Cleaning and filtering of data."""
    if not context.is_main:  # one process reads and writes; its own workers share the rest
        return
    block, work = cast(Prepare, context.block), context.dir / "work"
    check_languages(context, block)
    steps, ledger = Steps(block.steps, evaluations(context, block)), Ledger(block.steps)
    ledger.sources.update({source.name: Counter() for source in block.data})
    workers = block.workers or len(os.sched_getaffinity(0))

    rules = context.recipe.header.data
    shutil.rmtree(work, ignore_errors=True)
    with (
        Shards(work / "data") as shards,
        Rejections(work / "rejected.jsonl", rules.on_bad_row, rules.max_bad) as rejections,
        tqdm(unit=" rows", disable=None, desc=context.stage) as progress,
    ):
        for passages in ordered(steps, Steps.run_all, chunks(context, block), workers):
            for passage in passages:
                rejections.count(passage.source)
                if gone := ledger.enter(passage):
                    reason = f"{gone.step}: {gone.reason}"
                    rejections.add(passage.source, passage.row, reason, detail=gone.detail, bad=gone.step == READ)
                else:
                    shards.add(with_origin(passage))
            progress.update(len(passages))
            if context.stop_requested():
                raise Stopped
        for source in ledger.sources:
            rejections.finish(source)
    require_rows(context, ledger)
    write_report(work, ledger)
    print("\n".join(summary(ledger)), flush=True)

    metrics = {"rows/read": float(ledger.counts[READING].before), "rows/kept": float(ledger.kept)}
    context.publish(
        lambda folder: move(work, folder),
        base=None,
        method="none",
        metrics=metrics,
        counts=ledger.sources,
        zero_stage=0,
        others={"decontaminate": {path: Counter() for path in block.evaluation_files}},
    )


def chunks(context: Context, block: Prepare) -> Iterator[list[tuple[str, Row | Bad]]]:
    """All rows of all sources in order, (source, row), in lists of bounded size. Files go by their name inside the source."""
    chunk: list[tuple[str, Row | Bad]] = []
    held = 0
    for source in block.data:
        place = Path(location(context.recipe, context.run_dir, source))
        for row in islice(read_source(context.recipe, context.run_dir, source), source.limit):
            chunk.append((source.name, inside(row, place)))
            held += size(row.fields) if isinstance(row, Row) else 0
            if len(chunk) >= CHUNK_ROWS or held >= CHUNK_CHARACTERS:
                yield chunk
                chunk, held = [], 0
    if chunk:
        yield chunk


def inside(row: Row | Bad, place: Path) -> Row | Bad:
    """The row with its file's name as it is below `place`, so that what is written does not tell where data lies here."""
    file = Path(row.file)
    name = file.relative_to(place).as_posix() if place.is_dir() else file.name if file.is_file() else row.file
    if isinstance(row, Bad):
        return Bad(name, row.number, row.reason, row.detail)
    return Row(row.fields, name, row.number)


def with_origin(passage: Passage) -> dict[str, Any]:
    """The row's fields and where they are from; an earlier stage that wrote it already keeps what it says."""
    origin = {"relay_source": passage.source, "relay_file": passage.row.file, "relay_row": passage.row.number}
    return {**origin, **passage.fields}


def evaluations(context: Context, block: Prepare) -> dict[int, Evaluation]:
    """The evaluation files of every step that decontaminates, by the step's number."""
    found = {}
    for number, step in enumerate(block.steps):
        if isinstance(step, Decontaminate):
            found[number] = Evaluation(step.ngram)
            for path in step.against:
                found[number].add(path, evaluation_rows(context, number, path))
    return found


def evaluation_rows(context: Context, number: int, path: str) -> Iterator[dict[str, Any]]:
    for row in rows(context.recipe.data(path)):
        if isinstance(row, Bad):
            raise UserError(
                context.recipe.where("stages", context.stage, "steps", str(number), "decontaminate", "against"),
                f"{row.file}, row {row.number} cannot be read: {row.reason}",
                fix="mend the file: what is not read of it is not looked for",
            )
        yield row.fields


def check_languages(context: Context, block: Prepare) -> None:
    """Refuse a language that cannot be told."""
    for number, step in enumerate(block.steps):
        if isinstance(step, Language) and (strange := set(step.keep) - set(languages())):
            raise UserError(
                context.recipe.where("stages", context.stage, "steps", str(number), "language", "keep"),
                f"found {', '.join(sorted(strange))}",
                expected="ISO 639 codes among: " + ", ".join(languages()),
            )


def require_rows(context: Context, ledger: Ledger) -> None:
    """Refuse to hand on nothing."""
    if not ledger.kept:
        removed = {count.step: dict(count.removed) for count in ledger.counts.values() if count.removed}
        raise UserError(
            context.recipe.where("stages", context.stage),
            f"no row is left: {removed or 'there was none'}",
            expected="at least one row",
            fix=f"see {context.dir / 'work' / 'rejected.jsonl'}, and loosen or remove a step",
        )


def move(work: Path, folder: Path) -> None:
    """Move what was written into the folder that is published."""
    for entry in sorted(work.iterdir()):
        os.rename(entry, folder / entry.name)
    work.rmdir()


if __name__ == "__main__":
    main(prepare)
