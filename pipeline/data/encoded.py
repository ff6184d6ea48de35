"""Rows as token ids, on disk: made once on rank 0, memory-mapped by every rank, and found again by what they were made from.

They lie in `<run>/.rows/<stage>.<data key>/<hash>/`: `train.arrow`, `held_out.arrow`, `rejected.jsonl` and `counts.json`. The
hash is of the data's contents, of the part that the stage takes, of the tokenizer and of how rows are encoded: an edited
file, another share or another template is another one, and the folder of the one before is removed. A folder appears whole
or not at all. How sources are mixed is not in it: that is chosen among the rows here, when they are read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from pipeline import engine
from pipeline.config.kinds import KINDS
from pipeline.config.mixture import listed
from pipeline.config.recipe import digest, sources
from pipeline.data import encode, mix, table, workers
from pipeline.data.check import NAME as REJECTED
from pipeline.data.check import Rejections
from pipeline.data.encode import Prompt
from pipeline.data.shape import Example
from pipeline.data.split import Counts, Part, Placed, fingerprints, place
from pipeline.data.workers import Encode, Row
from pipeline.errors import UserError
from pipeline.handoff import write_json

if TYPE_CHECKING:
    from pipeline.stage import Context

FORMAT = 3
"""Raised when the same inputs give other rows than before."""

ROWS = ".rows"
SOURCE = "source"
"""The column that holds which of the stage's sources a row is of, counted from 0."""
PARTS: tuple[Part, ...] = ("train", "held_out")


@dataclass(frozen=True)
class Encoded:
    """`train` and `held_out` rows (by prompt), where every row of the data went, and the longest list of token ids.

    `names` are the sources' short names; `train_from` and `held_out_from`, int [rows], number each row's source among them.
    Of several sources the held-out rows lie mixed, so that the first of them, however many, hold each in proportion.
    """

    train: Dataset
    held_out: Dataset
    counts: Counts
    longest: int
    names: list[str]
    train_from: mix.Numbers
    held_out_from: mix.Numbers
    folder: Path

    def held_out_by_source(self, most: int) -> dict[str, list[int]]:
        """Places of the first `most` held-out rows by their source's name; nothing where all are of one."""
        first = self.held_out_from[:most]
        found = {name: np.flatnonzero(first == number).tolist() for number, name in enumerate(self.names)}
        found = {name: places for name, places in found.items() if places}
        return found if len(found) > 1 else {}


class Prompts(Sequence[Prompt]):
    """Encoded prompts, read from disk one by one. `names` are their sources', `source_of` each one's number among them."""

    def __init__(self, rows: Dataset, names: list[str], source_of: mix.Numbers) -> None:
        self.rows, self.names, self.source_of = rows, names, source_of

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = self.rows[place]
        return Prompt(row["ids"], json.loads(row["row"]), self.names[self.source_of[place]])


def demonstrations(context: Context, tok: Any, max_length: int, loss_on: str, key: str | None = None) -> Encoded:
    """Rows for next-token training, as `encode.demonstration` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length, "loss_on": loss_on}

    def make(example: Example) -> Row:
        return encode.demonstration(encoder, example, max_length, loss_on)

    return load(context, encoder, make, settings, key)


def answered(context: Context, tok: Any, max_length: int, max_prompt: int | None, *, replies: bool) -> Encoded:
    """Prompts with their replies, or alone, as `encode.answered` makes them."""
    encoder = encode.Encoder(tok)
    settings: dict[str, Any] = {"max_length": max_length, "max_prompt": max_prompt, "replies": replies}
    return load(context, encoder, lambda example: encode.answered(encoder, example, **settings), settings)


def preferences(context: Context, tok: Any, max_length: int) -> Encoded:
    """Rows for the pairwise loss, as `encode.preference` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    return load(context, encoder, lambda example: encode.preference(encoder, example, **settings), settings)


def compared(context: Context, tok: Any, max_length: int, key: str) -> Encoded:
    """Pairs to be scored, as `encode.compared` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    return load(context, encoder, lambda example: encode.compared(encoder, example, **settings), settings, key)


def pairs(context: Context, tok: Any, max_length: int) -> Encoded:
    """Rows for losses of pairs, as `encode.pair` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    return load(context, encoder, lambda example: encode.pair(encoder, example, **settings), settings)


def labelled(context: Context, tok: Any, max_length: int) -> Encoded:
    """Rows for losses of single replies, as `encode.labelled` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    return load(context, encoder, lambda example: encode.labelled(encoder, example, **settings), settings)


def documents(context: Context, tok: Any, key: str | None = None) -> Encoded:
    """Whole texts, as `encode.document` makes them."""
    encoder = encode.Encoder(tok)
    return load(context, encoder, lambda example: encode.document(encoder, example), {}, key)


def candidates(context: Context, tok: Any, max_length: int, max_prompt: int | None) -> Encoded:
    """Rows to choose from, as `encode.candidate` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length, "max_prompt": max_prompt}

    def make(example: Example) -> Row:
        return encode.candidate(encoder, example, max_length, max_prompt)

    return load(context, encoder, make, settings)


def prompts(context: Context, tok: Any, max_length: int) -> tuple[Prompts, Prompts, Counts]:
    """Prompts to train on, prompts held out, and where the rows went."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    found = load(context, encoder, lambda example: encode.prompt(encoder, example, **settings), settings)
    train = Prompts(found.train, found.names, found.train_from)
    return train, Prompts(found.held_out, found.names, found.held_out_from), found.counts


def load(
    context: Context, encoder: encode.Encoder, make: Encode, settings: dict[str, Any], key: str | None = None
) -> Encoded:
    """The rows that the stage lists under `key` (its first key of data), each encoded by `make`, which `settings` describe.

    Collective. Raises UserError, on every rank, when a source is unreadable or no row is left to train on.
    """
    kind = KINDS[context.block.kind]
    key = key or kind.sources[0]
    identity = _identity(context, encoder, settings, key)
    folder = context.run_dir / ROWS / f"{context.stage}.{key}" / digest(identity)[:16]

    def write() -> None:
        if not (folder / "counts.json").is_file():
            found = place(context.recipe, context.stage, context.run_dir, key)
            rules = context.recipe.header.data
            rejections = Rejections(folder.with_name(folder.name + "." + REJECTED), rules.on_bad_row, rules.max_bad)
            _write(folder, found, make, context.stage, rejections, lambda: _unchanged(context))
            _remove(other for other in folder.parent.iterdir() if other != folder)

    engine.on_main(write)
    record = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    counts = {source: Counter(found) for source, found in record["counts"].items()}
    parts = {part: with_source(table.read(folder / f"{part}.arrow", record["incomplete"])) for part in PARTS}
    if not len(parts["train"][0]) and context.block.kind != "evaluate" and key not in kind.measured:
        raise UserError(
            context.recipe.where("stages", context.stage, key),
            "no training row is left: " + _told(counts),
            expected="at least one row",
            fix="raise the share, the longest length or the limit, or lower data.holdout",
        )
    (train, train_from), (held_out, held_out_from) = parts["train"], parts["held_out"]
    names = mix.labels([source.name for source in sources(context.block, key)])
    if (places := _mixture(context, key, train_from, counts)) is not None:
        train, train_from = train.select(places), train_from[places]
    if len(np.unique(held_out_from)) > 1:
        places = mix.spread(held_out_from)
        held_out, held_out_from = held_out.select(places), held_out_from[places]
    return Encoded(train, held_out, counts, record["longest"], names, train_from, held_out_from, folder)


def with_source(rows: Dataset) -> tuple[Dataset, mix.Numbers]:
    """(rows without the column that says their source, and that column, in memory)."""
    if not len(rows):
        return rows, np.empty(0, dtype=np.int64)
    return rows.remove_columns(SOURCE), rows.data.column(SOURCE).to_numpy().astype(np.int64)


def _mixture(context: Context, key: str, source_of: mix.Numbers, counts: Counts) -> mix.Numbers | None:
    """Places of the training rows that make an epoch, and into `counts` how many of each source; None for all as they are."""
    found, wanted, _ = listed(context.block, key)
    sizes = np.bincount(source_of, minlength=len(found)).tolist()
    rates = mix.rates(sizes, [source.weight for source in found], wanted.temperature if wanted else None)
    if rates is None or len(found) < 2 or not sum(sizes):
        return None
    for source, size, rate in zip(found, sizes, rates, strict=True):
        if rate and not size:
            raise UserError(
                context.recipe.where("stages", context.stage, key),
                f"a weight for {source.name}, of which no training row is left: {_told({source.name: counts[source.name]})}"
                if source.name in counts
                else f"a weight for {source.name}, which holds no rows",
                fix="remove the source, or give it a larger share",
            )
    draws = mix.apportioned(sum(sizes), rates)
    for source, count in zip(found, draws, strict=True):
        counts.setdefault(source.name, Counter())["drawn"] += count
    return mix.drawn(source_of, draws, context.block.seed)


def _unchanged(context: Context) -> None:
    """Raise UserError where a source is not what it was when the stage began."""
    now = fingerprints(context.recipe, context.stage, context.inputs["parents"])
    changed = [found["path"] for found, was in zip(now, context.inputs["data"], strict=True) if found != was]
    if changed:
        raise UserError(
            f"data {changed[0]}",
            "it changed while the stage read it",
            expected="data that stays as it is while a stage starts",
            fix="run the same command again once it is written",
        )


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _identity(context: Context, encoder: encode.Encoder, settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Everything that decides what the rows are."""
    block, first = context.block, KINDS[context.block.kind].sources[0]
    found = sources(block, key)
    return {
        "format": FORMAT,
        "kind": block.kind,
        "key": key,
        "sources": [source.model_dump(mode="json", exclude={"weight"}) for source in found],
        "data": [data for data in context.inputs["data"] if data.get("for", first) == key],
        "intervals": [context.recipe.interval(context.stage, source) for source in found],
        "holdout": block.holdout,
        "rules": context.recipe.header.data.model_dump(mode="json"),
        "settings": settings,
        "tokenizer": encoder.identity,
        "versions": [version("transformers"), version("tokenizers")],
    }


def _write(
    folder: Path,
    rows: Iterable[Placed],
    make: Encode,
    stage: str,
    rejections: Rejections,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Raises UserError when too many rows are bad; then the list of them is all that is left. `check` may refuse the whole
    at the end."""
    fresh = folder.with_name(folder.name + ".writing")
    try:
        _write_all(fresh, rows, make, stage, rejections)
        check()
    except UserError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if rejections.path is not None and rejections.path.exists():
        os.replace(rejections.path, fresh / REJECTED)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)


def _write_all(fresh: Path, rows: Iterable[Placed], make: Encode, stage: str, rejections: Rejections) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    counts: Counts = {}
    writers = {part: table.Writer(fresh / f"{part}.arrow") for part in PARTS}
    used: Counter[int] = Counter()
    with rejections:
        for row, made in tqdm(workers.encoded(rows, make), desc=f"{stage}: rows", unit=" rows", disable=None):
            here = counts.setdefault(row.source.name, Counter())
            here["rows"] += 1
            rejections.count(row.source.name)
            limit = row.source.limit if row.part == "train" else None
            if row.part is None or isinstance(made, str):
                reason = made if isinstance(made, str) else row.reason
                here[reason] += 1
                if row.bad or row.part is not None:
                    rejections.add(row.source.name, row.row, reason, detail=row.detail, bad=row.bad)
            elif limit is not None and used[row.number] >= limit:
                here["over the limit"] += 1
            else:
                writers[row.part].add({**made, SOURCE: row.number})
                used[row.number] += row.part == "train"
                here["used" if row.part == "train" else "held out"] += 1
        for source in counts:
            rejections.finish(source)
    for writer in writers.values():
        writer.close()
    longest = max(writer.longest for writer in writers.values())
    incomplete = sorted(set().union(*(writer.incomplete for writer in writers.values())))
    write_json(fresh / "counts.json", {"counts": counts, "longest": longest, "incomplete": incomplete})


def _told(counts: Counts) -> str:
    return "; ".join(
        f"{source}: " + ", ".join(f"{number} {reason}" for reason, number in found.items())
        for source, found in counts.items()
    )
