"""Log-probabilities of a preference stage's rows by its reference: the policy as the stage starts, before anything trains.

They are read once, saved as they come in beside the encoded rows, and found again by what they depend on: the rows, the
policy and how its weights are held. No reference model is in memory while the policy trains, under any ZeRO stage, and
another learning rate, loss or beta reads nothing again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from pipeline import engine
from pipeline.config.preference import Dpo, Kto
from pipeline.config.recipe import digest
from pipeline.data.encoded import Encoded
from pipeline.handoff import Baton
from pipeline.stage import Context, Stopped

FORMAT = 1
"""Raised when the same inputs give other numbers than before."""
SAVED_ROWS = 4096
"""Rows that are read between one save and the next."""

Batch = dict[str, Tensor]
Read = Callable[[Any, Batch], Tensor]
"""Of a model and a batch of B rows: float32 [B, columns]."""


class Rows(Dataset[dict[str, Any]]):
    """Encoded rows with numbers of their own beside them: `columns`, each [rows]. With `partners`, int [rows], a row also has
    the reply of another one as `KL_completion_ids`."""

    def __init__(self, rows: Any, columns: dict[str, np.ndarray], partners: np.ndarray | None = None) -> None:
        self.rows, self.columns, self.partners = rows, columns, partners

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = {**self.rows[place], **{name: float(values[place]) for name, values in self.columns.items()}}
        if self.partners is not None:
            row["KL_completion_ids"] = self.rows[int(self.partners[place])]["completion_ids"]
        return row

    def beside(self, names: Sequence[str], values: np.ndarray) -> Rows:
        """These rows with the columns of `values` too: [rows, columns], the first of `names`."""
        added = {name: values[:, number] for number, name in enumerate(names[: values.shape[1]])}
        return Rows(self.rows, {**self.columns, **added}, self.partners)


def partners(rows: int, together: int) -> np.ndarray:
    """For each row the one before it among the `together` that are read together, and for the first the last: int64 [rows].
    A row that is left alone takes the one before it."""
    place = np.arange(rows)
    start = place // together * together
    size = np.minimum(start + together, rows) - start
    return np.where(size > 1, start + (place - start - 1) % size, (place - 1) % max(rows, 1))


class Reference:
    """Reads what a stage's starting policy says of its rows, or finds it read."""

    def __init__(
        self, context: Context, block: Dpo | Kto, parent: Baton | None, base: dict[str, Any], data: Encoded, micro: int
    ) -> None:
        """`base` is the manifest's record of the policy's base, `micro` the rows of a batch."""
        self.context, self.micro = context, micro
        identity = {
            "format": FORMAT,
            "rows": data.folder.name,
            "drawn": [[source.weight for source in block.data], block.mix and block.mix.model_dump(mode="json")],
            "kind": block.kind,
            "batches": [block.batch, micro],
            "seed": block.seed,
            "policy": parent.content_hash if parent is not None else None,
            "base": base,
            "held": block.base.model_dump(mode="json", exclude={"model"}),
            "adapter": block.adapter.model_dump(mode="json"),
        }
        self.folder = data.folder / f"reference-{digest(identity)[:16]}"
        engine.on_main(self._only)

    def _only(self) -> None:
        for other in self.folder.parent.glob("reference-*"):
            if other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)

    def log_probs(
        self, model: Any, config: dict[str, Any], part: str, rows: Rows, collate: Callable[..., Batch], read: Read
    ) -> np.ndarray:
        """What `read` says of all `rows`, float32 [rows, columns], the same on any number of ranks. `config` is DeepSpeed's.

        Collective. Raises Stopped, with all that was read saved, when the stage is asked to stop.
        """
        size = max(1, SAVED_ROWS // self.micro) * self.micro
        starts = range(0, len(rows), size)
        files = [self.folder / f"{part}-{start}-{min(start + size, len(rows))}.npy" for start in starts]
        missing = engine.agreed([number for number, file in enumerate(files) if not file.is_file()])
        if missing:
            with engine.forward_only(model, config) as run:
                for number in tqdm(
                    missing, desc=f"{self.context.stage}: reference", unit=" parts", disable=self._quiet
                ):
                    found = self._read(run, rows, starts[number], size, collate, read)
                    engine.on_main(lambda: _save(files[number], found))  # noqa: B023
                    if number != missing[-1] and self.context.stop_requested():
                        raise Stopped
        return np.concatenate([np.load(file) for file in files])

    @property
    def _quiet(self) -> bool | None:
        return None if self.context.is_main else True

    def _read(
        self, run: Any, rows: Rows, start: int, size: int, collate: Callable[..., Batch], read: Read
    ) -> np.ndarray:
        """Rows `start` to `start + size`: each batch by one rank, in as many passes as the others make."""
        end = min(start + size, len(rows))
        batches = [range(first, min(first + self.micro, end)) for first in range(start, end, self.micro)]
        world, found = self.context.world_size, None
        for turn in range(0, len(batches), world):
            number = turn + self.context.rank
            batch = batches[min(number, len(batches) - 1)]
            given = {
                name: value.to(engine.device()) for name, value in collate([rows[place] for place in batch]).items()
            }
            said = read(run, given).float()
            if found is None:
                found = torch.zeros(end - start, said.shape[1], device=said.device)
            if number < len(batches):
                found[batch.start - start : batch.stop - start] = said
        assert found is not None
        if world > 1:
            dist.all_reduce(found)  # of each row all ranks but one hold zero
        values: np.ndarray = found.cpu().numpy()
        return values


def _save(file: Path, values: np.ndarray) -> None:
    fresh = file.with_suffix(".writing")
    with fresh.open("wb") as stream:
        np.save(stream, values)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, file)


@torch.no_grad()
def replies(model: Any, batch: Batch, prefix: str = "") -> Tensor:
    """Summed log-probability of each sequence's completion, float32 [B], through TRL's fused output head."""
    ids = batch[f"{prefix}input_ids"]
    said = model(
        input_ids=ids,
        attention_mask=batch[f"{prefix}attention_mask"],
        labels=ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100),
        use_cache=False,
        fused_lm_head=True,
    )
    return said.log_probs.float()[:, -(ids.shape[1] - 1) :].sum(1)


def of_pairs(model: Any, batch: Batch) -> Tensor:
    """(chosen, rejected) of each pair, float32 [B, 2]."""
    return torch.stack(replies(model, batch).chunk(2), dim=1)


def of_replies(model: Any, batch: Batch) -> Tensor:
    """The reply of each row, and that of its partner to the row's prompt where there is one: float32 [B, 1 or 2]."""
    prefixes = ["", "KL_"] if "KL_input_ids" in batch else [""]
    return torch.stack([replies(model, batch, prefix) for prefix in prefixes], dim=1)
