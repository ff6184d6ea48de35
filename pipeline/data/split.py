"""Which rows a stage may use. A prompt's place in [0, 1) is a hash of its text: the part below `holdout` is never trained
on by any stage; the rest is cut into the stages' disjoint parts. Neither depends on the seed or on the order of rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pipeline.config.evaluate import Evaluate
from pipeline.config.kinds import KINDS
from pipeline.config.prepare import Prepare
from pipeline.config.recipe import Recipe, sources
from pipeline.config.schema import Classify, Source
from pipeline.data import glue
from pipeline.data.check import LOOKED_AT, Checked
from pipeline.data.read import Bad, Row, fingerprint, rows
from pipeline.data.shape import (
    Example,
    Skip,
    demonstration,
    document,
    plain,
    preference,
    prompt_only,
    recognise,
    unpaired,
)
from pipeline.data.texts import NO_TEXT, texts
from pipeline.errors import UserError

Part = Literal["train", "held_out"]
Counts = dict[str, Counter[str]]
"""Where the rows of each source went: source -> `rows`, `used`, `held out`, or why not -> how many."""

ELSEWHERE = "other stages' share"


@dataclass(frozen=True)
class Placed:
    """A row of `source` (the `number`-th of the stage's): the part its prompt falls into and its example; or why it is in
    none (`detail`: what differs between rows of one reason), `bad` when the row itself is at fault."""

    number: int
    source: Source
    row: Row | Bad
    part: Part | None = None
    example: Example | None = None
    reason: str = ""
    detail: str = ""
    bad: bool = False


def position(prompt: str) -> float:
    """A prompt's place in [0, 1): the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64


def reader(kind: str, source: Source, key: str) -> Callable[[Row], Example]:
    if kind == "prepare":
        return _any_text
    if kind in ("sft", "selection") or key == "ptx.data":
        return lambda row: demonstration(row, source.take)
    if kind == "distill":
        return lambda row: _answered(row, source.take)
    if kind == "pretrain" or key.startswith("forgetting."):
        return document
    if kind == "kto":
        return unpaired
    return preference if kind in ("reward", "dpo") or key.startswith("reward_model.") else prompt_only


def _answered(row: Row, take: str) -> Example:
    """Prompt and one reply, or, of a row whose shape has none, the prompt alone."""
    shape = recognise(row.fields)
    return prompt_only(row) if shape is not None and shape.name == "prompt" else demonstration(row, take)


def _any_text(row: Row) -> Example:
    """A row of any shape, as long as it says something."""
    if not texts(row.fields):
        raise Skip(NO_TEXT)
    return Example("")


def place(recipe: Recipe, stage: str, run_dir: Path, key: str | None = None) -> Iterator[Placed]:
    """Every row of the sources that `stage` lists under `key` (its first key of data), in order. Raises UserError when a
    source is unreadable."""
    block = recipe.stages[stage]
    key = key or KINDS[block.kind].sources[0]
    for number, source in enumerate(sources(block, key)):
        low, high = recipe.interval(stage, source)
        read = Checked(reader(block.kind, source, key))
        for row in read_source(recipe, run_dir, source):
            if isinstance(row, Bad):
                yield Placed(number, source, row, reason=row.reason, detail=row.detail, bad=True)
                continue
            try:
                origin = (number, row.file, row.number)
                example = replace(read(row), source=source.name, origin=origin, row=row.fields)
            except Skip as reason:
                yield Placed(number, source, row, reason=str(reason), bad=reason.bad)
                continue
            here = position(plain(example.prompt) or plain(example.chosen or ""))
            if here < block.holdout or key in KINDS[block.kind].measured:
                yield Placed(number, source, row, "held_out", example)
            elif low <= (here - block.holdout) / (1.0 - block.holdout) < high:
                yield Placed(number, source, row, "train", example)
            else:
                yield Placed(number, source, row, reason=ELSEWHERE)


def read_source(recipe: Recipe, run_dir: Path, source: Source) -> Iterator[Row | Bad]:
    """The rows of a source, as they stand in their files."""
    return rows(location(recipe, run_dir, source), source.revision, source.split, source.subset)


def location(recipe: Recipe, run_dir: Path, source: Source) -> str:
    """The path of a source as this machine has it, or its hub id."""
    if source.stage is not None:
        return str(run_dir / source.stage / "output" / "data")
    assert source.path is not None
    return recipe.data(source.path)


def check(recipe: Recipe, stage: str, run_dir: Path) -> None:
    """Look at the first rows of everything `stage` reads. Raises UserError for a source that is missing or unreadable, or
    of whose first rows none can be used."""
    block = recipe.stages[stage]
    for key in KINDS[block.kind].sources:
        for source in sources(block, key):
            read, faults = reader(block.kind, source, key), Counter[str]()
            first = list(islice(read_source(recipe, run_dir, source), LOOKED_AT))
            for row in first:
                if isinstance(row, Bad):
                    faults[row.reason] += 1
                    continue
                try:
                    read(row)
                except Skip as reason:
                    faults[str(reason)] += 1
            if not first or faults.total() == len(first):
                worst = faults.most_common(1)
                raise UserError(
                    recipe.where("stages", stage, key),
                    f"none of the first {len(first)} rows of {source.name} can be used: {worst[0][0]}"
                    if worst
                    else f"{source.name} holds no rows",
                    expected="rows that stage can read",
                    fix=f"relay data show {source.name}",
                )


def fingerprints(recipe: Recipe, stage: str, parents: Mapping[str, str]) -> list[dict[str, Any]]:
    """Name and content hash of every source of `stage`; `for` is the key it is listed under, if not the first. `parents`
    are the content hashes of its upstream stages."""
    block = recipe.stages[stage]
    if isinstance(block, Classify):
        return glue.fingerprints(recipe, stage)
    found = []
    for place, key in enumerate(KINDS[block.kind].sources):
        for source in sources(block, key):
            path = source.path
            here = (source.revision, source.split, source.subset)
            content = parents[source.stage or ""] if path is None else fingerprint(recipe.data(path), *here)
            found.append({"path": source.name, "sha256": content} | ({"for": key} if place else {}))
    if isinstance(block, Prepare):
        found += [_file(recipe, path, "decontaminate") for path in block.evaluation_files]
    if isinstance(block, Evaluate):
        found += [_file(recipe, path, "forgetting") for path in (block.forgetting.files if block.forgetting else ())]
        asked = block.chat_judge.prompt if block.chat_judge else None
        found += [_file(recipe, asked, "chat_judge")] if asked else []
    return found


def _file(recipe: Recipe, path: str, reason: str) -> dict[str, Any]:
    """What a manifest says of a file that is read whole, or as a suite needs it."""
    return {"path": path, "sha256": fingerprint(recipe.data(path)), "for": reason}
