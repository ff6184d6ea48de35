"""Documents in pieces that fit a model: nothing is dropped, and every token but a document's first is a target once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from pipeline import engine
from pipeline.data import table
from pipeline.data.encoded import PARTS, SOURCE, Encoded, with_source
from pipeline.data.mix import Numbers
from pipeline.data.packed import choice

if TYPE_CHECKING:
    from pipeline.stage import Context


def spans(length: int, longest: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces, of at most `longest` tokens, of a document of `length` tokens, 2 or more of both.

    A piece begins with the last token of the one before: a sequence's first token is no target, and would be none anywhere.
    """
    for start in range(0, length - 1, longest - 1):
        yield start, min(start + longest, length)


def pieces(context: Context, data: Encoded, max_length: int) -> Encoded:
    """`data`, of whole documents, cut into rows of `input_ids` and `labels` of at most `max_length` tokens. Collective; kept
    beside the documents, in the file that an equal choice of documents finds again."""
    chosen = choice(context, data, max_length)
    files = {part: data.folder / f"{part}-{chosen}.arrow" for part in PARTS}

    def write() -> None:
        _cut(data.train, data.train_from, max_length, files["train"])
        _cut(data.held_out, data.held_out_from, max_length, files["held_out"])

    engine.on_main(write)
    (train, train_from), (held_out, held_out_from) = (with_source(table.read(files[part], [])) for part in PARTS)
    longest = min(data.longest, max_length)
    return replace(
        data, train=train, train_from=train_from, held_out=held_out, held_out_from=held_out_from, longest=longest
    )


def _cut(documents: Dataset, source_of: Numbers, max_length: int, file: Path) -> None:
    """Write the pieces of `documents`, if there are any and the file is not there."""
    if not len(documents) or file.exists():
        return
    fresh, numbers = file.with_suffix(".writing"), iter(source_of.tolist())
    writer = table.Writer(fresh)
    for batch in documents.iter(table.BATCH):
        for ids in batch["input_ids"]:
            number = next(numbers)
            for start, end in spans(len(ids), max_length):
                writer.add({"input_ids": ids[start:end], "labels": ids[start:end], SOURCE: number})
    writer.close()
    fresh.rename(file)
