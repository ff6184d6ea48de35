"""Several rows in one sequence, none of which sees another.

Positions start anew at each row and there is no attention mask: from that transformers makes an attention mask of blocks
along the diagonal, one for each row (`find_packed_sequence_indices` in its `masking_utils`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from pipeline import engine
from pipeline.config.recipe import digest
from pipeline.data.encoded import Encoded

if TYPE_CHECKING:
    from pipeline.stage import Context

LENGTHS = "seq_lengths"
"""The column, called as TRL calls it, of the lengths of the rows in a sequence."""


def packed(context: Context, data: Encoded, max_length: int) -> Dataset:
    """The training rows in sequences of up to `max_length` tokens, with the lengths of the rows in each, as TRL packs them:
    best fit decreasing (Ding et al. 2024, arXiv 2404.10830), a thousand rows at a time. Collective; kept beside the rows."""
    file = data.folder / f"packed-{choice(context, data, max_length)}.arrow"

    def write() -> None:
        if not file.is_file():
            from trl import pack_dataset

            how = {"cache_file_name": str(file), "load_from_cache_file": False, "desc": f"{context.stage}: packing"}
            pack_dataset(data.train, max_length, "bfd", how)

    engine.on_main(write)
    return Dataset.from_file(str(file))


def choice(context: Context, data: Encoded, max_length: int) -> str:
    """A short name of which rows were chosen, and of how long they may be together."""
    block: Any = context.block
    mixture = [block.mix and block.mix.temperature, *(source.weight for source in block.data)]
    return digest([max_length, len(data.train), mixture, block.seed])[:16]


@dataclass(frozen=True)
class Collator:
    """Puts sequences side by side: input_ids, labels and position_ids, int64 [B, L], padded on the right to the longest.

    Every padding token has position 0, which makes it a row of its own: no token sees it. A row's first token is no target,
    since what comes before it is another row's.
    """

    pad: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
        for place, row in enumerate(rows):
            lengths = torch.tensor(row.get(LENGTHS) or [len(row["input_ids"])])
            starts, total = lengths.cumsum(0) - lengths, int(lengths.sum())
            ids[place, :total] = torch.tensor(row["input_ids"])
            labels[place, :total] = torch.tensor(row["labels"])
            labels[place, starts] = -100
            positions[place, :total] = torch.arange(total) - starts.repeat_interleave(lengths)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
