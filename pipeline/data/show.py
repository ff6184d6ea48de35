"""`relay data show`: what a data set is taken for, how long its rows are, and some of them as the model will see them."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from pipeline.data.check import Rejections, examples
from pipeline.data.read import Bad, Row, rows
from pipeline.data.shape import Example, Text, demonstration, plain, preference, prompt_only, recognise
from pipeline.errors import UserError

commands = typer.Typer(no_args_is_help=True, help="Look at training data.")
console = Console(highlight=False, soft_wrap=True)

Kind = Literal["sft", "reward", "ppo"]
KINDS: tuple[Kind, ...] = ("sft", "reward", "ppo")
READERS: dict[Kind, Callable[[Row], Example]] = {
    "sft": lambda row: demonstration(row, "chosen"),
    "reward": preference,
    "ppo": prompt_only,
}
PERCENTILES = (5, 50, 95, 99, 100)
TOLD: dict[Kind, str] = {
    "sft": "[[trained on]]",
    "reward": "the score is read at [[…]]",
    "ppo": "the policy writes what follows",
}
LONGEST = 2**31 - 1
"""Rows of any length are shown: none is left out for being too long."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
IGNORED = -100
"""Label of a token that no loss is taken at."""


@commands.callback()
def _group() -> None:
    """Keeps `show` a command of its own while it is the only one."""


@commands.command()
def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="a file, folder, glob or hub id")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="model whose tokenizer and chat template the rows will meet")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="sft, reward or ppo; default: what the rows are fit for")] = None,
    shown: Annotated[int, typer.Option("--rows", min=0, help="how many rows to show")] = 3,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    split: Annotated[str, typer.Option(help="split of a hub id or a saved data set")] = "train",
    subset: Annotated[str | None, typer.Option(help="subset (configuration) of a hub id")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="read so many rows; default all")] = None,
) -> None:
    """Show how PATH is read, its bad rows, lengths, and some rows.

    Rows are shown as the model will see them.
    """
    if kind not in (None, *KINDS):
        raise UserError(f"--kind {kind}", "no such kind", expected=", ".join(KINDS))
    view = _View(tokenizer)
    rejections = Rejections(most=1.0)
    shapes: Counter[str] = Counter()
    read = _Reader(kind)
    given = _seen(islice(rows(path, revision, split, subset), limit), shapes)
    kept: list[tuple[Row, Example]] = []
    lengths: dict[str, array[int]] = {}
    for row, example in examples(path, given, read, rejections):
        for name, length in view.lengths(read.chosen, example).items():
            lengths.setdefault(name, array("Q")).append(length)
        if len(kept) < shown:
            kept.append((row, example))
    _summary(path, shapes, read.chosen, rejections, limit)
    if lengths:
        console.print(_percentiles(lengths))
    if view.encoder is None:
        console.print(
            "Text only, before any chat template. With --tokenizer MODEL: lengths in tokens, and what is trained."
        )
    for row, example in kept:
        console.print(Styled(f"\n{row.where}", "bold"))
        for styled in view.styled(read.chosen, example):
            console.print(styled)


class _Reader:
    """Reads rows for `kind`; if that is None, for what the first row with a known shape is fit for."""

    def __init__(self, kind: str | None) -> None:
        self.kind: Any = kind

    @property
    def chosen(self) -> Kind:
        return self.kind or "sft"

    def __call__(self, row: Row) -> Example:
        if self.kind is None and (shape := recognise(row.fields)):
            self.kind = "reward" if shape.pair else "ppo" if shape.name == "prompt" else "sft"
        return READERS[self.chosen](row)


def _seen(given: Iterator[Row | Bad], shapes: Counter[str]) -> Iterator[Row | Bad]:
    """The same rows; counts their shapes on the way."""
    for row in given:
        if isinstance(row, Row):
            shapes[str(recognise(row.fields) or "not recognised")] += 1
        yield row


class _View:
    """Rows as a model sees them, with its tokenizer; as they stand in the file, without."""

    def __init__(self, model: str | None) -> None:
        self.encoder: Any = None if model is None else _encoder(model)

    def lengths(self, kind: Kind, example: Example) -> dict[str, int]:
        """Length of each text in characters and, with a tokenizer, of each sequence in tokens, EOS included."""
        found = {f"{name}, characters": len(plain(text)) for name, text in _texts(example).items()}
        if self.encoder is not None:
            found |= {f"{name}, tokens": len(ids) for name, ids, _ in self._sequences(kind, example)}
        return found

    def _sequences(self, kind: Kind, example: Example) -> Iterator[tuple[str, list[int], list[bool]]]:
        """(name, ids, which of them count) of every sequence that a stage of `kind` makes of the row."""
        from pipeline.data import encode

        if kind == "sft":
            row = encode.demonstration(self.encoder, example, LONGEST, "completion")
            yield "prompt and reply", row["input_ids"], [label != IGNORED for label in row["labels"]]
        elif kind == "reward":
            row = encode.preference(self.encoder, example, LONGEST)
            for name in ("chosen", "rejected"):
                ids = row[f"{name}_ids"]
                yield (
                    f"prompt and {name}",
                    ids,
                    [*[False] * (len(ids) - 1), True],
                )  # the score is read at the last token
        else:
            ids = encode.prompt(self.encoder, example, LONGEST)["ids"]
            yield "prompt", ids, [False] * len(ids)

    def styled(self, kind: Kind, example: Example) -> Iterator[Styled]:
        """One block of text for each sequence. The tokens that count are bold green and stand in [[ ]]."""
        if self.encoder is None:
            for name, text in _texts(example).items():
                yield Styled(f"{name}: ", "bold") + Styled(_safe(plain(text)))
            return
        for name, ids, counts in self._sequences(kind, example):
            block = Styled(f"{name}, {len(ids)} tokens; {TOLD[kind]}: ", "bold")
            for piece, on in _pieces(self.encoder.tokenizer, ids, counts):
                block.append(_safe(f"[[{piece}]]" if on else piece), "bold green" if on else None)
            yield block


def _texts(example: Example) -> dict[str, Text]:
    found = {"prompt": example.prompt, "reply": example.chosen, "rejected reply": example.rejected}
    return {name: text for name, text in found.items() if text}


def _safe(text: str) -> str:
    """Text without characters that command a terminal, which data of others may hold; they are written out."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _encoder(model: str) -> Any:
    from transformers import AutoTokenizer

    from pipeline.data.encode import Encoder

    try:
        # Left out, trust_remote_code asks at the terminal whether to run a model's code.
        options = {"model_max_length": LONGEST, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(model, **options)  # nosec B615 # to look at rows
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {model}",
            f"cannot be loaded: {(str(error).splitlines() or [''])[0]}",
            expected="a folder with a tokenizer, or a model of the hub",
        ) from None
    return Encoder(tokenizer)


def _pieces(tokenizer: Any, ids: list[int], trained: list[bool]) -> Iterator[tuple[str, bool]]:
    """The text in runs of tokens that are trained on and not. A run is what its tokens add to the text so far: decoded
    alone, it could lose a space or a letter that two tokens share."""
    done, before = 0, ""
    while done < len(ids):
        end = done
        while end < len(ids) and trained[end] == trained[done]:
            end += 1
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        yield text[len(before) :], trained[done]
        done, before = end, text


def _summary(path: str, shapes: Counter[str], kind: Kind, rejections: Rejections, limit: int | None) -> None:
    count, reasons = rejections.rows[path], rejections.reasons.get(path, Counter())
    table = Table(title=f"{path}, read for {kind}", title_justify="left", show_header=False)
    table.add_row("rows" if limit is None or count < limit else "first rows", f"{count:,}")
    for name, rows_of in shapes.most_common():
        table.add_row("recognised as" if name != "not recognised" else "", Styled(f"{name}: {rows_of:,}"))
    table.add_row("can be used", f"{count - reasons.total():,}")
    for reason, left_out in reasons.most_common():
        table.add_row("left out", Styled(f"{reason}: {left_out:,}"))
    console.print(table)


def _percentiles(lengths: dict[str, array[int]]) -> Table:
    """Nearest-rank percentiles: each is the length of a row."""
    import numpy as np

    table = Table("length of", *("max" if p == 100 else f"p{p}" for p in PERCENTILES))
    for name, values in lengths.items():
        ranks = np.percentile(np.frombuffer(values, dtype=np.uint64), PERCENTILES, method="inverted_cdf")
        table.add_row(name, *(f"{int(value):,}" for value in ranks))
    return table
