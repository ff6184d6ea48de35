"""Rows of one shape in an Arrow file: written one by one, read back memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as arrow
from datasets import Dataset

BATCH = 256


class Writer:
    """Writes rows, all with the same columns, into an Arrow stream; the file is absent when there are none.

    `longest` is the longest list; `incomplete` the columns of which some row has no value.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.longest, self.incomplete = path, 0, set[str]()
        self._rows: list[dict[str, Any]] = []
        self._schema: arrow.Schema | None = None
        self._sink: Any = None

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if value is None:
                self.incomplete.add(name)
            elif isinstance(value, list):
                self.longest = max(self.longest, len(value))
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._schema is None:
            self._schema = arrow.schema([(name, _type(value)) for name, value in self._rows[0].items()])
            self._sink = arrow.ipc.new_stream(str(self.path), self._schema)
        self._sink.write_batch(arrow.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        if self._sink is not None:
            self._sink.close()


def _type(value: Any) -> arrow.DataType:
    if isinstance(value, list):
        return arrow.list_(arrow.int32())
    if isinstance(value, bool):
        return arrow.bool_()
    return arrow.string() if isinstance(value, str) else arrow.int32() if isinstance(value, int) else arrow.float64()


def read(path: Path, incomplete: list[str]) -> Dataset:
    """The rows of a file, without the columns that some row lacks; no row where there is no file."""
    if not path.is_file():
        return Dataset.from_dict({})
    rows = Dataset.from_file(str(path))
    return rows.remove_columns([name for name in rows.column_names if name in incomplete])
