"""`relay data show`: what a data set is taken for, how long its rows are, and some of them as the model will see them."""

from __future__ import annotations

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
from pipeline.data.shape import Example, Skip, demonstration, plain, preference, prompt_only, recognise
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
LONGEST = 2**31 - 1
"""Rows of any length are shown: none is left out for being too long."""


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
    limit: Annotated[int | None, typer.Option(min=1, help="read so many rows; default all")] = None,
) -> None:
    """What PATH is recognised as, how many rows are good, how long they are, and some as the model will see them."""
    if kind not in (None, *KINDS):
        raise UserError(f"--kind {kind}", "no such kind", expected=", ".join(KINDS))
    view = _View(tokenizer)
    rejections = Rejections(most=1.0)
    shapes: Counter[str] = Counter()
    read = _Reader(kind)  # type: ignore[arg-type]
    given = _seen(islice(rows(path, revision, split), limit), shapes)
    kept: list[tuple[Row, Example]] = []
    lengths: dict[str, array[int]] = {}
    for row, example in examples(path, given, read, rejections):
        for name, length in view.lengths(example).items():
            lengths.setdefault(name, array("Q")).append(length)
        if len(kept) < shown:
            kept.append((row, example))
    _summary(path, shapes, read.kind or "sft", rejections, limit)
    if lengths:
        console.print(_percentiles(lengths))
    if view.encoder is None:
        console.print(
            "Text only, before any chat template. With --tokenizer MODEL: lengths in tokens, and what is trained."
        )
    for row, example in kept:
        console.print(f"\n[bold]{row.where}[/bold]", style=None, markup=True)
        for styled in view.styled(read.kind or "sft", example):
            console.print(styled)


class _Reader:
    """Reads rows for `kind`; if that is None, for what the first row with a known shape is fit for."""

    def __init__(self, kind: Kind | None) -> None:
        self.kind = kind

    def __call__(self, row: Row) -> Example:
        if self.kind is None and (shape := recognise(row.fields)):
            self.kind = "reward" if shape.pair else "ppo" if shape.name == "prompt" else "sft"
        return READERS[self.kind or "sft"](row)


def _seen(given: Iterator[Row | Bad], shapes: Counter[str]) -> Iterator[Row | Bad]:
    """The same rows; counts their shapes on the way."""
    for row in given:
        if isinstance(row, Row):
            shapes[str(recognise(row.fields) or "not recognised")] += 1
        yield row


class _View:
    """Rows as a model sees them, with its tokenizer; as they stand in the file, without."""

    def __init__(self, model: str | None) -> None:
        self.encoder: Any = None
        if model is not None:
            self.encoder = _encoder(model)

    def lengths(self, example: Example) -> dict[str, int]:
        """Length of each text in characters and, with a tokenizer, in tokens as they are trained on (EOS included)."""
        texts = {name: text for name, text in _texts(example).items() if text is not None}
        found = {f"{name}, characters": len(plain(text)) for name, text in texts.items()}
        if self.encoder is not None:
            found |= {f"{name}, tokens": len(ids) for name, (ids, _) in self._ids(example).items()}
        return found

    def _ids(self, example: Example) -> dict[str, tuple[list[int], list[bool]]]:
        """(ids, which are trained on) of the prompt alone or of prompt with each reply."""
        from pipeline.data import encode

        found: dict[str, tuple[list[int], list[bool]]] = {}
        try:
            for name, reply in (("prompt + chosen", example.chosen), ("prompt + rejected", example.rejected)):
                if reply is not None:
                    one = Example(example.prompt, reply, tools=example.tools)
                    row = encode.demonstration(self.encoder, one, LONGEST, "completion")
                    found[name] = row["input_ids"], [label != -100 for label in row["labels"]]
            if not found:
                ids = encode.prompt(self.encoder, example, LONGEST)["ids"]
                found["prompt"] = ids, [False] * len(ids)
        except Skip as skip:
            found[f"left out: {skip}"] = [], []
        return found

    def styled(self, kind: Kind, example: Example) -> Iterator[Styled]:
        """One block of text for each sequence. What is trained on is bold green and stands in [[ ]]."""
        if self.encoder is None:
            for name, text in _texts(example).items():
                if text is not None:
                    yield Styled(f"{name}: ", "bold") + Styled(plain(text))
            return
        for name, (ids, trained) in self._ids(example).items():
            if kind == "reward":
                trained = [False] * (len(ids) - 1) + [True] * bool(ids)  # the score is read at the last token
            told = {"sft": "trained on", "reward": "the score is read at", "ppo": "nothing is trained on"}[kind]
            block = Styled(f"{name} ({len(ids)} tokens; {told}{'' if kind == 'ppo' else ' [[…]]'}): ", "bold")
            for piece, on in _pieces(self.encoder.tokenizer, ids, trained):
                block.append(f"[[{piece}]]" if on else piece, "bold green" if on else None)
            yield block


def _texts(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt or None, "chosen": example.chosen, "rejected": example.rejected}


def _encoder(model: str) -> Any:
    from transformers import AutoTokenizer

    from pipeline.data.encode import Encoder

    try:
        return Encoder(AutoTokenizer.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {model}",
            f"cannot be loaded: {(str(error).splitlines() or [''])[0]}",
            expected="a folder with a tokenizer, or a model of the hub",
        ) from None


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


def _summary(path: str, shapes: Counter[str], kind: str, rejections: Rejections, limit: int | None) -> None:
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
