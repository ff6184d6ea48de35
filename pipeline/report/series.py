"""Curves of a metrics file: read as it grows, thinned so that no extreme is lost."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Points = tuple[list[int], list[float]]

BUCKETS = 240
"""Each column keeps the least and the greatest value of so many stretches of steps: about as many as a chart has pixels."""


class Series:
    """The columns of one `metrics.jsonl`. `update` reads what was added since; a file that was replaced is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.columns: dict[str, Points] = {}
        self.last_time: float | None = None
        self.last_step: int | None = None
        self._inode, self._offset = 0, 0

    def update(self) -> None:
        """Read whole lines from where the last reading ended; a line that is still being written waits for the next time."""
        try:
            with self.path.open("rb") as stream:
                found = os.fstat(stream.fileno())  # of what is read, even if another file takes its place now
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._forget()
                    self._inode = found.st_ino
                stream.seek(self._offset)
                raw = stream.read()
        except OSError:
            return self._forget()
        whole, newline, _ = raw.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # a torn line, or none of ours
        when = row.pop("time", None)
        self.last_step = step
        self.last_time = when if isinstance(when, int | float) else self.last_time
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = self.columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))

    def thinned(self, buckets: int = BUCKETS) -> dict[str, dict[str, list[Any]]]:
        """{column: {"x": steps, "y": values}}, each of at most two points a bucket."""
        return {name: dict(zip("xy", thin(*points, buckets), strict=True)) for name, points in self.columns.items()}


def thin(steps: list[int], values: list[float], buckets: int) -> Points:
    """The first and last point, and of each of `buckets` equal stretches its least and its greatest one, in order."""
    count = len(steps)
    if count <= 2 * buckets + 2:
        return steps, values
    kept = {0, count - 1}
    for bucket in range(buckets):
        inside = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]
