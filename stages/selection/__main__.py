"""Choose the rows worth training on: MoDS (Du, Zong and Zhang 2023, arXiv 2311.15653).

Reads rows with a reply, a reward model, and, for necessity, a policy that was trained on an earlier selection. Quality: the
reward model likes the row's reply. Necessity: it does not like the policy's own reply to the row's prompt. Coverage: k-center
greedy over what is left. Hands on the chosen rows as they were (`data/*.parquet`) and what every row scored and why it was not
chosen (`scores.parquet`). Held-out prompts are never chosen. It trains nothing; the distances are one rank's work.

    deepspeed --num_gpus 2 --module stages.selection --recipe mods.yaml --stage select --run-dir runs/mods
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as compute
from datasets import Dataset

from pipeline import checkpoint, engine
from pipeline.config.selection import Selection
from pipeline.data import encoded
from pipeline.data.shards import Shards, storable
from pipeline.errors import UserError
from pipeline.model import begin
from pipeline.stage import Context, main
from stages.selection.models import Models, first_baton
from stages.selection.phases import Phases, Read
from stages.selection.table import Table, chosen_before, origins


def selection(context: Context) -> None:
    """Choose the rows worth training on."""
    block = cast(Selection, context.block)
    device = engine.start(block.seed, context.recipe.header.deterministic)

    parent = first_baton(context, block)
    tok = begin.tokenizer(context, parent)
    longest_prompt = block.sampling.max_prompt_length if block.necessity else None
    data = encoded.candidates(context, tok, block.max_length, longest_prompt)
    rows = data.train
    models = Models(context, block, tok, rows, device)
    table = Table(origins(context, block, rows))
    given = chosen_before(context, block, table.origins)

    with context.tracker(3 * -(-len(rows) // block.micro_batch), resumed(context)) as tracker:
        phases = Phases(context, block, tokens_of(rows), tracker)
        left = list(range(len(rows)))
        if block.quality is not None:
            read = phases.run("quality", left, models.quality)
            left = kept(context, table, "quality", left, read)
        left = sorted(set(left) - set(given))
        if block.necessity is not None:
            read = phases.run("necessity", left, models.necessity)
            left = kept(context, table, "necessity", left, read)
        if not left and not given:
            raise UserError(
                context.recipe.where("stages", context.stage),
                f"none of {len(rows)} rows is left to choose from",
                expected="at least one",
                fix="lower quality.threshold or raise necessity.threshold, or give `keep`",
            )
        states = phases.run("coverage", [*given, *left], models.states)

        def spread() -> None:
            assert states is not None
            points = states.values.to(device)
            table.cover(left, points, block.budget - len(given), given, block.include)

        engine.on_main(spread)
        metrics = table.metrics()
        tracker.log(phases.done, metrics)
    if context.is_main and len(table.chosen) < block.budget:
        print(f"{len(table.chosen)} rows pass, fewer than the budget of {block.budget}: all are chosen", flush=True)

    base = begin.base_record(models.base)
    write = writer(rows, table)
    context.publish(write, base=base, method="none", metrics=metrics, counts=data.counts, zero_stage=0)


def kept(context: Context, table: Table, name: str, rows: list[int], read: Read | None) -> list[int]:
    """Those of `rows` that the criterion `name` leaves, on every rank: high scores of quality, low ones of necessity."""
    rule = getattr(context.block, name)

    def judge() -> list[int]:
        assert read is not None
        return table.judge(name, rows, read, rule, highest=name == "quality")

    return engine.on_main(judge)


def resumed(context: Context) -> int:
    """How many batches an interrupted run of this stage has saved."""
    saved: dict[str, int] = {}
    for folder in context.checkpoints.glob("*-*/COMPLETE.json"):
        name, _, _ = folder.parent.name.rpartition("-")
        saved[name] = max(saved.get(name, 0), checkpoint.step_of(folder.parent))
    return sum(saved.values())


def tokens_of(rows: Dataset) -> np.ndarray:
    """Tokens of each row's prompt and reply, int64 [rows]."""
    columns: Any = rows.with_format("arrow")[:]
    counts = [compute.list_value_length(columns[name]) for name in ("prompt_ids", "reply_ids")]
    return np.asarray(counts[0].to_numpy() + counts[1].to_numpy(), dtype=np.int64)


def writer(rows: Dataset, table: Table) -> Any:
    """The function that writes the chosen rows and all rows' scores into a folder."""

    def write(folder: Path) -> None:
        with Shards(folder / "data") as shards:
            for number in table.chosen:
                shards.add(storable(json.loads(rows[number]["row"])))
        table.write(folder)

    return write


if __name__ == "__main__":
    main(selection)
