"""The held-out loss of each source of a mixture, beside the loss over all of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback

from pipeline.tracking import Tracker


class BySource(TrainerCallback):
    """At every evaluation, `held_out/<source>/loss`, the mean over the target tokens of the source's rows in nats, and its
    perplexity; `metrics` holds the last ones. `places` are the rows of each source; without any it does nothing."""

    def __init__(self, training: Any, rows: Dataset, places: dict[str, list[int]], tracker: Tracker) -> None:
        self.training, self.rows, self.places, self.tracker = training, rows, places, tracker
        self.metrics: dict[str, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.metrics = self.measure()
        if self.metrics:
            self.tracker.log(state.global_step, self.metrics)

    def measure(self) -> dict[str, float]:
        """Loss and perplexity of every source's rows now. Collective."""
        found: dict[str, float] = {}
        if not self.places:
            return found
        sums = losses(self.training, self.rows, self.training.args.per_device_eval_batch_size)
        for name, places in self.places.items():
            loss, tokens = sums[places].sum(0).tolist()
            loss = loss / max(tokens, 1.0)
            found |= {f"held_out/{name}/loss": loss, f"held_out/{name}/perplexity": perplexity(loss)}
        return found


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))


@torch.no_grad()
def losses(training: Any, rows: Dataset, batch: int) -> torch.Tensor:
    """(negative log-likelihood in nats, number) of each row's target tokens, float64 [rows, 2], the same on every rank.
    Collective: every rank takes its part, in as many passes as the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-len(rows) // world)
    mine = [min(place, len(rows) - 1) for place in range(rank * share, (rank + 1) * share)]
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    seen = torch.zeros(len(rows), 1, dtype=torch.float64)
    training.model.eval()
    for start in range(0, share, batch):
        picked = mine[start : start + batch]
        given = training._prepare_inputs(training.data_collator([rows[place] for place in picked]))
        said = training.model(**given, fused_lm_head=True)
        sums = torch.stack([-said.log_probs.float().sum(1), said.label_mask.sum(1)], dim=1).double().cpu()
        found[picked], seen[picked] = sums, 1.0
    both = torch.cat([found, seen], dim=1).to(training.args.device)
    dist.all_reduce(both)
    return (both[:, :2] / both[:, 2:]).cpu()
