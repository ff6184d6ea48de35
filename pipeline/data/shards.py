"""Rows to Parquet files and back, in bounded memory, the same bytes for the same rows. Torch-free.

Rows of one stage may differ in their fields and in their values' types. A file holds rows of one kind: the same names with
the same types. Numbers, text, lists of text and lists of messages {role, content} are columns as other programs write them.
Any other nested value (tool calls, schemas) is JSON text, because a Parquet column would give every row the keys of all
others; its column is marked, and `decoded` gives back the value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

GROUP_ROWS = 10_000
GROUP_CHARACTERS = 16_000_000
"""A row group is written once it has so many rows or characters: what is held in memory for each kind of row."""

FILE_ROWS = 500_000
MARK = {b"relay": b"json"}
MESSAGE = ("role", "content")

TYPES = {
    "bool": arrow.bool_(),
    "int": arrow.int64(),
    "float": arrow.float64(),
    "text": arrow.string(),
    "texts": arrow.list_(arrow.string()),
    "messages": arrow.list_(arrow.struct([(name, arrow.string()) for name in MESSAGE])),
    "json": arrow.string(),
}


@dataclass
class _Kind:
    """Rows that wait to be written and the file that they go into."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    characters: int = 0
    writer: parquet.ParquetWriter | None = None
    written: int = 0


class Shards:
    """Writes `part-00000.parquet`, … into a folder; files are numbered as they are begun. Use as a context."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = 0
        self._kinds: dict[tuple[tuple[str, str], ...], _Kind] = {}
        self._usual: dict[str, str] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                for types, kind in self._kinds.items():
                    self._flush(types, kind)
        finally:
            for kind in self._kinds.values():
                if kind.writer:
                    kind.writer.close()

    def add(self, fields: dict[str, Any]) -> None:
        """Take in a row; values that JSON does not know, such as dates, become text."""
        types = tuple((name, self._type(name, fields[name])) for name in sorted(fields))
        kind = self._kinds.setdefault(types, _Kind())
        kind.rows.append(fields)
        kind.characters += size(fields)
        if len(kind.rows) >= GROUP_ROWS or kind.characters >= GROUP_CHARACTERS:
            self._flush(types, kind)

    def _type(self, name: str, value: Any) -> str:
        """The type of a value; of nothing that of the column's last value, so that a gap makes no new kind of row."""
        if value is None:
            return self._usual.get(name, "text")
        self._usual[name] = found = _type_of(value)
        return found

    def _flush(self, types: tuple[tuple[str, str], ...], kind: _Kind) -> None:
        if not kind.rows:
            return
        if kind.writer is None or kind.written >= FILE_ROWS:
            if kind.writer:
                kind.writer.close()
            path = self._folder / f"part-{self._files:05d}.parquet"
            kind.writer, kind.written = parquet.ParquetWriter(path, _schema(types), compression="zstd"), 0
            self._files += 1
        columns = [[_stored(row[name], type_) for row in kind.rows] for name, type_ in types]
        schema = _schema(types)
        arrays = [arrow.array(column, entry.type) for column, entry in zip(columns, schema, strict=True)]
        kind.writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))
        kind.written += len(kind.rows)
        kind.rows, kind.characters = [], 0


def decoded(schema: arrow.Schema, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as Arrow gives them (`to_pylist`), with the values of columns that hold JSON read."""
    names = [entry.name for entry in schema if entry.metadata and MARK.items() <= entry.metadata.items()]
    if not names:
        return rows
    return [{k: json.loads(v) if k in names and v is not None else v for k, v in row.items()} for row in rows]


def storable(value: Any) -> Any:
    """A row's value as UTF-8 can hold it: a lone surrogate becomes U+FFFD, a pair of them its character."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    elif isinstance(value, dict):
        return {key: storable(inner) for key, inner in value.items()}
    elif isinstance(value, list):
        return [storable(inner) for inner in value]
    return value


def _schema(types: tuple[tuple[str, str], ...]) -> arrow.Schema:
    return arrow.schema([arrow.field(n, TYPES[t], metadata=MARK if t == "json" else None) for n, t in types])


def _type_of(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() if -(2**63) <= value < 2**63:
            return "int"
        case float():
            return "float"
        case int() | dict():
            return "json"
        case list():
            if all(isinstance(item, str) for item in value):
                return "texts"
            return "messages" if all(_is_message(item) for item in value) else "json"
        case _:
            return "text"


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and item.keys() == set(MESSAGE) and all(isinstance(item[k], str) for k in MESSAGE)


def _stored(value: Any, type_: str) -> Any:
    if value is None:
        return None
    if type_ == "json":
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return str(value) if type_ == "text" else value


def size(value: Any) -> int:
    """Characters in a value's strings; other values count as eight."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(size(inner) for inner in value.values())
    return sum(size(inner) for inner in value) if isinstance(value, list) else 8
