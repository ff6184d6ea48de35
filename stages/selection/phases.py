"""Going through many rows with a model: cut over the ranks, saved as it goes, the same numbers on any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import checkpoint, engine
from pipeline.config.selection import Selection
from pipeline.stage import Context, Stopped
from pipeline.tracking import Tracker


@dataclass(frozen=True)
class Read:
    """What a model said of some rows, in order: `values` float32 [rows] or [rows, width]; `texts`, if any, one for each."""

    values: Tensor
    texts: list[str] = field(default_factory=list)


def joined(parts: Sequence[Read]) -> Read:
    return Read(torch.cat([part.values for part in parts]), [text for part in parts for text in part.texts])


class Phases:
    """Goes through rows once for each thing that is asked of them.

    Rows are cut into batches by their lengths, before ranks come in: each batch gives the same numbers on whichever rank.
    What was read is saved under `checkpoints/<phase>-<batches>/`, each folder holding what came after the one before.
    """

    def __init__(self, context: Context, block: Selection, lengths: np.ndarray, tracker: Tracker) -> None:
        """`lengths` int [N]: tokens of each row."""
        self.context, self.block, self.lengths, self.tracker = context, block, lengths, tracker
        self.done = 0

    def run(self, name: str, rows: list[int], read: Callable[[list[int]], Read]) -> Read | None:
        """What `read` says of `rows`, in their order, on rank 0; None elsewhere. `read` is given the numbers of a few of them.

        Collective. Raises Stopped, with all that was read saved, when the stage is asked to stop.
        """
        if not rows:
            return Read(torch.zeros(0)) if self.context.is_main else None
        ordered = sorted(rows, key=lambda row: (self.lengths[row], row))
        size = self.block.micro_batch
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        saved, parts = self._saved(name) if self.context.is_main else (0, [])
        start = engine.agreed(saved)
        while start < len(batches):
            end, mine, stop = start, [], False
            while end < min(len(batches), start + self.block.save_every * self.context.world_size) and not stop:
                number = end + self.context.rank
                if number < len(batches):
                    mine.append((number, read(batches[number])))
                end = min(end + self.context.world_size, len(batches))
                stop = self.context.stop_requested() and end < len(batches)
            found = self._gathered(mine)
            if self.context.is_main:
                parts.append(joined([part for _, part in found]))
                self._save(name, start, end, parts[-1])
                self.tracker.log(self.done + end, {f"{name}/rows": float(min(end * size, len(rows)))})
            if stop:
                raise Stopped
            start = end
        self.done += len(batches)
        if not self.context.is_main:
            return None
        whole, place = joined(parts), {row: number for number, row in enumerate(ordered)}
        order = [place[row] for row in rows]
        return Read(whole.values[order], [whole.texts[number] for number in order] if whole.texts else [])

    def _gathered(self, mine: list[tuple[int, Read]]) -> list[tuple[int, Read]]:
        """All ranks' batches in order, on rank 0."""
        if self.context.world_size == 1:
            return mine
        parts: list[Any] | None = [None] * self.context.world_size if self.context.is_main else None
        dist.gather_object(mine, parts, dst=0)
        return sorted((one for part in parts or [] for one in part), key=lambda one: int(one[0]))

    def _save(self, name: str, start: int, end: int, part: Read) -> None:
        folder = self.context.checkpoints / f"{name}-{end}"
        fresh = folder.with_name(folder.name + ".writing")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        np.save(fresh / "values.npy", part.values.numpy())
        (fresh / "texts.json").write_text(json.dumps(part.texts), encoding="utf-8")
        checkpoint.complete(fresh, {"start": start})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(fresh, folder)

    def _saved(self, name: str) -> tuple[int, list[Read]]:
        """(batches read so far, what was read): the saved parts up to the first that is missing or damaged."""
        parts, done = [], 0
        folders = {checkpoint.step_of(p): p for p in self.context.checkpoints.glob(f"{name}-*") if _number(p)}
        for end, folder in sorted(folders.items()):
            problem = checkpoint.damage(folder)
            if problem is not None or checkpoint.facts(folder)["start"] != done:
                print(f"{folder} is left out: {problem or 'the part before it is missing'}", flush=True)
                break
            texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
            parts.append(Read(torch.from_numpy(np.load(folder / "values.npy")), texts))
            done = end
        return done, parts


def _number(folder: Path) -> bool:
    return folder.name.rpartition("-")[2].isdigit()
