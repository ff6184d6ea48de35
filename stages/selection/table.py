"""What a selection knows of every row: `scores.parquet`, a line for each."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import torch
from datasets import Dataset
from torch import Tensor

from pipeline.config.selection import Cut, Selection
from pipeline.data.split import location
from pipeline.errors import Trouble, UserError
from pipeline.scoring.choose import Cover, cut, k_center
from pipeline.stage import Context
from stages.selection.phases import Read

SCORES = "scores.parquet"
CHOSEN = "chosen"
Origin = tuple[int, str, int]
"""The number of a source in the recipe's list, from 1; a file; the row in it."""


class Table:
    """One row of scores for each candidate; `verdict` is `chosen`, `chosen by STAGE`, or what a row fell short of: `quality`,
    `necessity`, `budget`."""

    def __init__(self, origins: list[Origin]) -> None:
        size = len(origins)
        self.origins = origins
        self.scores: dict[str, list[float | None]] = {"quality": [None] * size, "necessity": [None] * size}
        self.answers: list[str | None] = [None] * size
        self.ranks: list[int | None] = [None] * size
        self.distances: list[float | None] = [None] * size
        self.verdicts = ["budget"] * size
        self.radius = 0.0

    def judge(self, name: str, rows: list[int], read: Read, rule: Cut, *, highest: bool) -> list[int]:
        """Write down what `rows` scored, and return those of them that `rule` keeps."""
        for row, value in zip(rows, read.values.tolist(), strict=True):
            self.scores[name][row] = value
        for row, text in zip(rows, read.texts, strict=False):
            self.answers[row] = text
        if wrong := [row for row, value in zip(rows, read.values, strict=True) if not bool(torch.isfinite(value))]:
            source, file, number = self.origins[wrong[0]]
            raise Trouble(f"the {name} score of row {number} of {file} (source {source}) is not finite")
        kept = [rows[place] for place in cut(read.values, rule, highest=highest)]
        for row in set(rows) - set(kept):
            self.verdicts[row] = name
        return kept

    def cover(self, rows: list[int], points: Tensor, count: int, given: list[int], by: str | None) -> None:
        """Choose up to `count` of `rows` so that they and the `given` ones, which stage `by` chose, are spread.

        `points` float32 [given and rows, width] are their embeddings, those of the given ones first.
        """
        found: Cover = k_center(points, count, range(len(given)))
        both = [*given, *rows]
        for row, distance in zip(both, found.distance.tolist(), strict=True):
            self.distances[row] = None if distance != distance else distance
        for row in given:
            self.verdicts[row], self.distances[row] = f"{CHOSEN} by {by}", None
        for rank, place in enumerate(found.order, 1):
            self.verdicts[both[place]], self.ranks[both[place]] = CHOSEN, rank
        self.radius = found.radius

    @property
    def chosen(self) -> list[int]:
        """The chosen rows in the order of the data."""
        return [row for row, verdict in enumerate(self.verdicts) if verdict.startswith(CHOSEN)]

    def metrics(self) -> dict[str, float]:
        """How many rows each criterion left, mean scores of all and of the chosen rows, and the radius of k-center."""
        chosen, found = self.chosen, {"rows": float(len(self.verdicts)), "coverage/radius": self.radius}
        found["rows/chosen"] = float(len(chosen))
        for name, scores in self.scores.items():
            known = [score for score in scores if score is not None]
            taken = [scores[row] for row in chosen if scores[row] is not None]
            if known:
                found[f"{name}/refused"] = float(self.verdicts.count(name))
                found[f"{name}/mean"] = sum(known) / len(known)
            if taken:
                found[f"{name}/mean_chosen"] = sum(score for score in taken if score is not None) / len(taken)
        return found

    def write(self, folder: Path) -> None:
        """Columns source, file and row say which row it is; quality, necessity and answer are null where nobody asked; rank is
        the place in k-center's order from 1, distance that to the nearest row chosen (before, where it is chosen)."""
        sources, files, numbers = (list(column) for column in zip(*self.origins, strict=True))
        columns = {
            "source": arrow.array(sources, arrow.int32()),
            "file": arrow.array(files, arrow.string()),
            "row": arrow.array(numbers, arrow.int64()),
            "quality": arrow.array(self.scores["quality"], arrow.float32()),
            "necessity": arrow.array(self.scores["necessity"], arrow.float32()),
            "answer": arrow.array(self.answers, arrow.string()),
            "rank": arrow.array(self.ranks, arrow.int32()),
            "distance": arrow.array(self.distances, arrow.float32()),
            "verdict": arrow.array(self.verdicts, arrow.string()),
        }
        parquet.write_table(arrow.table(columns), folder / SCORES, compression="zstd")


def origins(context: Context, block: Selection, rows: Dataset) -> list[Origin]:
    """Where each row came from, in words that hold on any machine."""
    tops = [_top(location(context.recipe, context.run_dir, source)) for source in block.data]
    found = []
    for text in rows["origin"]:
        source, file, number = json.loads(text)
        inside = os.path.relpath(file, tops[source])
        found.append((source + 1, os.path.basename(file) if inside == "." else inside, number))
    return found


def _top(place: str) -> str:
    """The folder that a source's files lie below; a hub id's rows lie below itself."""
    if os.path.isfile(place):
        return os.path.dirname(place)
    parts = Path(place).parts
    magic = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return place if os.path.isdir(place) else str(Path(*parts[:magic]))


def chosen_before(context: Context, block: Selection, known: list[Origin]) -> list[int]:
    """The rows that the included selection chose. Raises UserError when one of them is none of this stage's."""
    if block.include is None:
        return []
    table = parquet.read_table(context.batons[block.include].path / SCORES).to_pylist()
    chosen = [(row["source"], row["file"], row["row"]) for row in table if row["verdict"].startswith(CHOSEN)]
    places = {origin: place for place, origin in enumerate(known)}
    if lost := [origin for origin in chosen if origin not in places]:
        raise UserError(
            context.recipe.where("stages", context.stage, "include"),
            f"{block.include} chose {len(lost)} rows that cannot be read here, the first is row {lost[0][2]} of {lost[0][1]}",
            expected="the same rows",
            fix="raise sampling.max_prompt_length, above which prompts are left out where a model answers them",
        )
    return sorted(places[origin] for origin in chosen)
