"""Which rows a stage may use. A prompt's place in [0, 1) is a hash of its text: the part below `holdout` is never trained
on by any stage; the rest is cut into the stages' disjoint shares. Neither depends on the seed or on the order of rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.config.kinds import KINDS
from pipeline.config.recipe import Recipe, sources
from pipeline.config.schema import Classify, Source
from pipeline.data import glue
from pipeline.data.read import Row, fingerprint, rows
from pipeline.data.shape import Example, Skip, demonstration, plain, preference, prompt_only
from pipeline.errors import UserError

Part = Literal["train", "held_out"]


@dataclass
class Split:
    """A stage's examples: `train` and `held_out` (by prompt), and where every row went (`counts`: source -> reason -> rows)."""

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def part(self, name: Part) -> list[Example]:
        return self.train if name == "train" else self.held_out

    def leave_out(self, example: Example, name: Part, reason: str) -> None:
        """Count an example that the stage does not use for `reason`, so that every row stays counted once."""
        counts = self.counts[example.source]
        counts["used" if name == "train" else "held out"] -= 1
        counts[reason] += 1


def position(prompt: str) -> float:
    """A prompt's place in [0, 1): the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64


def reader(kind: str, source: Source, key: str) -> Callable[[Row], Example]:
    if kind == "sft" or key == "ptx.data":
        return lambda row: demonstration(row, source.take)
    return preference if kind == "reward" else prompt_only


def load(recipe: Recipe, stage: str, key: str | None = None) -> Split:
    """Read the sources that `stage` lists under `key` (its first key of data) and split them.

    Raises UserError when a source is unreadable or nothing is left.
    """
    block = recipe.stages[stage]
    key = key or KINDS[block.kind].sources[0]
    split = Split()
    for source in sources(block, key):
        low, high = recipe.interval(stage, source)
        counts = split.counts.setdefault(source.path, Counter())
        read = reader(block.kind, source, key)
        for row in rows(recipe.local(source.path)):
            counts["rows"] += 1
            try:
                example = replace(read(row), source=source.path, row=row.fields)
            except Skip as reason:
                counts[str(reason)] += 1
                continue
            place = position(plain(example.prompt))
            if place < block.holdout:
                counts["held out"] += 1
                split.held_out.append(example)
            elif not low <= (place - block.holdout) / (1.0 - block.holdout) < high:
                counts["other stages' share"] += 1
            elif source.limit is not None and counts["used"] >= source.limit:
                counts["over the limit"] += 1
            else:
                counts["used"] += 1
                split.train.append(example)
    if not split.train and block.kind != "evaluate":
        raise UserError(
            recipe.where("stages", stage),
            f"no training row is left: {dict(split.counts)}",
            expected="at least one row",
            fix="raise the share or lower data.holdout",
        )
    return split


def fingerprints(recipe: Recipe, stage: str) -> list[dict[str, Any]]:
    """Path as written and content hash of every source of `stage`; `for` is the key it is listed under, if not the first."""
    block = recipe.stages[stage]
    if isinstance(block, Classify):
        return glue.fingerprints(recipe, stage)
    first, *others = KINDS[block.kind].sources
    listed: list[tuple[Source, dict[str, str]]] = [(source, {}) for source in sources(block, first)]
    listed += [(source, {"for": key}) for key in others for source in sources(block, key)]
    return [{"path": s.path, "sha256": fingerprint(recipe.local(s.path)), **use} for s, use in listed]
