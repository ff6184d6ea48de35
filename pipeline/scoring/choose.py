"""Which rows to take, from their scores and embeddings: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.selection import Cut


def cut(scores: Tensor, rule: Cut, *, highest: bool) -> list[int]:
    """Places in `scores` [N] that `rule` keeps, ascending: scores strictly above its threshold (below it, unless `highest`),
    or its share of all, rounded up, with the best ones; equal scores in order of place."""
    ordered = scores if highest else -scores
    if rule.threshold is not None:
        limit = rule.threshold if highest else -rule.threshold
        return (ordered > limit).nonzero().flatten().tolist()
    assert rule.keep is not None
    count = math.ceil(rule.keep * len(scores) - 1e-9)  # 0.3 of 10 is 3, though 0.3 * 10 may be a little more
    best = torch.sort(ordered, descending=True, stable=True).indices[:count]
    return sorted(best.tolist())


@dataclass(frozen=True)
class Cover:
    """`order`: places of the centres in the order in which they were chosen, the given ones not among them.

    `distance` float32 [N]: of a point to its nearest centre; of a centre to its nearest earlier one, when it was chosen (0
    for a given one, NaN for the first of all).
    """

    order: list[int]
    distance: Tensor

    @property
    def radius(self) -> float:
        """The largest distance of a point to its nearest centre, 0 when all are centres: what k-center wants small."""
        left = torch.ones(len(self.distance), dtype=torch.bool)
        left[self.order] = False
        return float(self.distance[left].max()) if bool(left.any()) else 0.0


def k_center(points: Tensor, count: int, given: Sequence[int] = ()) -> Cover:
    """Up to `count` centres among `points` float32 [N, D], each the farthest from those before it, by Euclidean distance.

    Farthest-first traversal (Gonzalez 1985), whose radius is at most twice the smallest possible, with the pool of `given`
    centres of Sener and Savarese 2018 (arXiv 1708.00489, algorithm 1). Without given ones the first centre is the point
    closest to the mean. Equal distances: the first point. Time N x `count` x D; runs where `points` lie.
    """
    nearest = torch.full((len(points),), math.inf, device=points.device)
    open_ = torch.ones(len(points), dtype=torch.bool, device=points.device)
    found = torch.full_like(nearest, math.nan)

    def take(place: int) -> None:
        found[place], open_[place] = nearest[place], False
        torch.minimum(nearest, distances(points, points[place]), out=nearest)

    for place in given:
        take(place)
        found[place] = 0.0
    order: list[int] = []
    while len(order) < count and bool(open_.any()):
        begun = bool(order or given)
        place = first(torch.where(open_, nearest, -1.0) if begun else -distances(points, points.mean(0)))
        take(place)
        order.append(place)
    if order and not given:
        found[order[0]] = math.nan
    return Cover(order, torch.where(open_, nearest, found).cpu())


def distances(points: Tensor, centre: Tensor) -> Tensor:
    """Euclidean distance of each of `points` [N, D] to `centre` [D], by differences: states of one model have much in common,
    which the faster form |x|^2 + |c|^2 - 2xc would lose its digits to."""
    return torch.cdist(points, centre.unsqueeze(0), compute_mode="donot_use_mm_for_euclid_dist").squeeze(1)


def first(values: Tensor) -> int:
    """The place of the largest of `values` [N], the first of equal ones."""
    return int((values == values.max()).nonzero()[0])
