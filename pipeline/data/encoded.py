"""Rows as token ids, on disk: made once on rank 0, memory-mapped by every rank, and found again by what they were made from.

They lie in `<run>/.rows/<key>/`: `train.arrow`, `held_out.arrow`, `rejected.jsonl` and `counts.json`. The key is a hash of the
data's contents, of the part that the stage takes, of the tokenizer and of how rows are encoded: an edited file, another
share or another template is another key. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as arrow
from datasets import Dataset
from tqdm import tqdm

from pipeline import engine
from pipeline.config.kinds import KINDS
from pipeline.config.recipe import digest, sources
from pipeline.data import encode
from pipeline.data.check import NAME as REJECTED
from pipeline.data.check import Rejections
from pipeline.data.encode import Prompt
from pipeline.data.shape import Example, Skip
from pipeline.data.split import Counts, Part, Placed, place
from pipeline.errors import UserError
from pipeline.handoff import write_json

if TYPE_CHECKING:
    from pipeline.stage import Context

FORMAT = 1
"""Raised when the same inputs give other rows than before."""

ROWS = ".rows"
PARTS: tuple[Part, ...] = ("train", "held_out")
CHUNK = 256
FEW = 16 * CHUNK
"""Up to so many rows, starting other processes would take longer than it saves."""

Row = dict[str, Any]
Encode = Callable[[Example], Row]


@dataclass(frozen=True)
class Encoded:
    """`train` and `held_out` rows (by prompt), where every row of the data went, and the longest list of token ids."""

    train: Dataset
    held_out: Dataset
    counts: Counts
    longest: int


class Prompts(Sequence[Prompt]):
    """Encoded prompts, read from disk one by one."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = self.rows[place]
        return Prompt(row["ids"], json.loads(row["row"]))


def demonstrations(context: Context, tok: Any, max_length: int, loss_on: str, key: str | None = None) -> Encoded:
    """Rows for next-token training, as `encode.demonstration` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length, "loss_on": loss_on}

    def make(example: Example) -> Row:
        return encode.demonstration(encoder, example, max_length, loss_on)

    return load(context, encoder, make, settings, key)


def preferences(context: Context, tok: Any, max_length: int) -> Encoded:
    """Rows for the pairwise loss, as `encode.preference` makes them."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    return load(context, encoder, lambda example: encode.preference(encoder, example, **settings), settings)


def prompts(context: Context, tok: Any, max_length: int) -> tuple[Prompts, Prompts, Counts]:
    """Prompts to train on, prompts held out, and where the rows went."""
    encoder, settings = encode.Encoder(tok), {"max_length": max_length}
    found = load(context, encoder, lambda example: encode.prompt(encoder, example, **settings), settings)
    return Prompts(found.train), Prompts(found.held_out), found.counts


def load(
    context: Context, encoder: encode.Encoder, make: Encode, settings: dict[str, Any], key: str | None = None
) -> Encoded:
    """The rows that the stage lists under `key` (its first key of data), each encoded by `make`, which `settings` describe.

    Collective. Raises UserError, on every rank, when a source is unreadable or no row is left to train on.
    """
    key = key or KINDS[context.block.kind].sources[0]
    identity = _identity(context, encoder, settings, key)
    folder = context.run_dir / ROWS / digest(identity)[:16]

    def write() -> None:
        if not (folder / "counts.json").is_file():
            found = place(context.recipe, context.stage, context.run_dir, key)
            rules = context.recipe.header.data
            rejections = Rejections(folder.with_name(folder.name + "." + REJECTED), rules.on_bad_row, rules.max_bad)
            _write(folder, found, make, context.stage, rejections)

    engine.on_main(write)
    record = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    counts = {source: Counter(found) for source, found in record["counts"].items()}
    parts = {part: _open(folder / f"{part}.arrow", record["incomplete"]) for part in PARTS}
    if not len(parts["train"]) and context.block.kind != "evaluate":
        raise UserError(
            context.recipe.where("stages", context.stage, key),
            "no training row is left: " + _told(counts),
            expected="at least one row",
            fix="raise the share, the longest length or the limit, or lower data.holdout",
        )
    return Encoded(parts["train"], parts["held_out"], counts, record["longest"])


def _identity(context: Context, encoder: encode.Encoder, settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Everything that decides what the rows are."""
    block, first = context.block, KINDS[context.block.kind].sources[0]
    listed = sources(block, key)
    return {
        "format": FORMAT,
        "kind": block.kind,
        "key": key,
        "sources": [source.model_dump(mode="json") for source in listed],
        "data": [found for found in context.inputs["data"] if found.get("for", first) == key],
        "intervals": [context.recipe.interval(context.stage, source) for source in listed],
        "holdout": block.holdout,
        "rules": context.recipe.header.data.model_dump(mode="json"),
        "settings": settings,
        "tokenizer": encoder.identity,
        "versions": [version("transformers"), version("tokenizers")],
    }


def _write(folder: Path, rows: Iterable[Placed], make: Encode, stage: str, rejections: Rejections) -> None:
    """Raises UserError when too many rows are bad; then the list of them is all that is left."""
    try:
        _write_all(folder.with_name(folder.name + ".writing"), folder, rows, make, stage, rejections)
    except UserError:
        shutil.rmtree(folder.with_name(folder.name + ".writing"), ignore_errors=True)
        raise


def _write_all(
    fresh: Path, folder: Path, rows: Iterable[Placed], make: Encode, stage: str, rejections: Rejections
) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    counts: Counts = {}
    writers = {part: _Writer(fresh / f"{part}.arrow") for part in PARTS}
    used: Counter[int] = Counter()
    with rejections:
        for row, made in tqdm(_encoded(rows, make), desc=f"{stage}: rows", unit=" rows", disable=None):
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
                writers[row.part].add(made)
                used[row.number] += row.part == "train"
                here["used" if row.part == "train" else "held out"] += 1
        for source in counts:
            rejections.finish(source)
    for writer in writers.values():
        writer.close()
    longest = max(writer.longest for writer in writers.values())
    incomplete = sorted(set().union(*(writer.incomplete for writer in writers.values())))
    write_json(fresh / "counts.json", {"counts": counts, "longest": longest, "incomplete": incomplete})
    if rejections.path is not None and rejections.path.exists():
        os.replace(rejections.path, fresh / REJECTED)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)


def _told(counts: Counts) -> str:
    return "; ".join(
        f"{source}: " + ", ".join(f"{number} {reason}" for reason, number in found.items())
        for source, found in counts.items()
    )


def _encoded(rows: Iterable[Placed], make: Encode) -> Iterator[tuple[Placed, Row | str]]:
    """Each row with its encoding, or with why it has none; in order. Many rows are encoded by several processes."""
    stream = iter(rows)
    few = list(islice(stream, FEW))
    yield from zip(few, _chunk([row.example for row in few], make), strict=True)
    if len(few) == FEW:
        yield from _by_processes(stream, make, len(os.sched_getaffinity(0)))


def _by_processes(stream: Iterator[Placed], make: Encode, processes: int) -> Iterator[tuple[Placed, Row | str]]:
    """At most two chunks for each process are read ahead."""
    waiting: deque[tuple[list[Placed], Any]] = deque()
    with get_context("fork").Pool(processes, _remember, (make,)) as pool:
        while chunk := list(islice(stream, CHUNK)):
            waiting.append((chunk, pool.apply_async(_remembered, ([row.example for row in chunk],))))
            if len(waiting) > 2 * processes:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())


def _finished(chunk: list[Placed], result: Any) -> Iterator[tuple[Placed, Row | str]]:
    return zip(chunk, result.get(), strict=True)


def _chunk(examples: list[Example | None], make: Encode) -> list[Row | str]:
    """What each example is as token ids, or why it cannot be; nothing for none."""
    made: list[Row | str] = []
    for example in examples:
        try:
            made.append(make(example) if example is not None else {})
        except Skip as reason:
            made.append(str(reason))
    return made


_make: Encode
"""What this process encodes with; set where it starts, since a closure cannot be sent to it."""


def _remember(make: Encode) -> None:
    global _make
    _make = make


def _remembered(examples: list[Example | None]) -> list[Row | str]:
    return _chunk(examples, _make)


class _Writer:
    """Writes rows, all with the same columns, into an Arrow stream; the file is absent when there are none.

    `longest` is the longest list; `incomplete` the columns of which some row has no value.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.longest, self.incomplete = path, 0, set[str]()
        self._rows: list[Row] = []
        self._schema: arrow.Schema | None = None
        self._sink: Any = None

    def add(self, row: Row) -> None:
        for name, value in row.items():
            if value is None:
                self.incomplete.add(name)
            elif isinstance(value, list):
                self.longest = max(self.longest, len(value))
        self._rows.append(row)
        if len(self._rows) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._schema is None:
            self._schema = arrow.schema([(name, _type(value)) for name, value in self._rows[0].items()])
            self._sink = arrow.ipc.new_stream(str(self.path), self._schema)
        self._sink.write_batch(arrow.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        if self._sink is not None:
            self._sink.close()


def _type(value: Any) -> arrow.DataType:
    if isinstance(value, list):
        return arrow.list_(arrow.int32())
    return arrow.string() if isinstance(value, str) else arrow.bool_() if isinstance(value, bool) else arrow.float64()


def _open(path: Path, incomplete: list[str]) -> Dataset:
    if not path.is_file():
        return Dataset.from_dict({})
    rows = Dataset.from_file(str(path))
    return rows.remove_columns([name for name in rows.column_names if name in incomplete])
