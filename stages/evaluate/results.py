"""What the parts of an evaluate stage found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.split import Counts


@dataclass(frozen=True)
class Results:
    """`metrics` by name; `tables` of rows by the name of the file they go to; `counts` of the data by the key that lists it,
    the prompts' under the empty one."""

    metrics: dict[str, float]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Iterable[Results]) -> Results:
        whole = cls({})
        for part in parts:
            whole.metrics.update(part.metrics)
            whole.tables.update(part.tables)
            whole.counts.update(part.counts)
        return whole
