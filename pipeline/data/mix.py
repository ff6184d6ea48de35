"""Mixtures of sources: how many rows of each make an epoch, which ones, and what metrics call the sources.

Rates are the recipe's weights, or a temperature's: with n rows of a source its rate is n^(1/T), by size at T = 1 and ever
more equal above it (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2, where n is capped by an artificial limit; here by
the source's `limit`). Rows are chosen once for all epochs, on one list that neither ranks nor a resume change.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

FORMATS = re.compile(r"(\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|bz2|xz|zst))+$")


def rates(sizes: Sequence[int], weights: Sequence[float | None], temperature: float | None) -> list[float] | None:
    """How often each source is drawn from, of any scale; None where rows are to be used as they are."""
    if temperature is not None:
        most = max([*sizes, 1])  # of sizes over the largest, a power of 1/T cannot overflow
        return [(size / most) ** (1.0 / temperature) for size in sizes]
    return None if None in weights else [weight for weight in weights if weight is not None]


def apportioned(total: int, rates: Sequence[float]) -> list[int]:
    """`total` draws by `rates`: whole shares, and what is left to the largest remainders (the first of equal ones)."""
    exact = [total * rate / sum(rates) for rate in rates]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda source: whole[source] - exact[source])
    for source in by_remainder[: total - sum(whole)]:
        whole[source] += 1
    return whole


def drawn(source_of: Numbers, draws: Sequence[int], seed: int) -> Numbers:
    """Places of the rows that make an epoch, in random order: of source i `draws[i]`, in whole passes and a random rest.

    `source_of` is each row's source, int [rows].
    """
    random = np.random.RandomState(seed)  # whose stream NumPy promises not to change
    chosen = []
    for source, count in enumerate(draws):
        places = np.flatnonzero(source_of == source)
        passes, rest = divmod(count, len(places)) if count else (0, 0)
        chosen += [np.tile(places, passes), random.permutation(places)[:rest]]
    return random.permutation(np.concatenate(chosen))


def spread(source_of: Numbers) -> Numbers:
    """An order of the rows in which every beginning holds each source in proportion; within a source as they stand."""
    along = np.empty(len(source_of))
    for source in np.unique(source_of):
        places = np.flatnonzero(source_of == source)
        along[places] = (np.arange(len(places)) + 0.5) / len(places)
    return np.argsort(along, kind="stable")


def labels(names: Sequence[str]) -> list[str]:
    """Short, distinct names for metrics: the end of each path, as much as tells them apart; numbered where nothing does."""
    parts = [_parts(name) for name in names]
    deepest, depth, found = max(map(len, parts), default=1), 1, list[str]()
    while depth <= deepest:
        found = ["-".join(path[-depth:]) for path in parts]
        if len(set(found)) == len(found):
            return found
        depth += 1
    seen: Counter[str] = Counter()
    for place, label in enumerate(found):
        seen[label] += 1
        if seen[label] > 1:
            found[place] = f"{label}-{seen[label]}"
    return found


def _parts(name: str) -> list[str]:
    """The components of a path that a metric's name may hold; globs say nothing."""
    path = FORMATS.sub("", name.removeprefix("stage "))
    return [part for raw in path.split("/") if (part := re.sub(r"[^\w.-]+", "-", raw).strip("-."))] or ["data"]
