"""What a reader gives for a row: the row, why it cannot be read, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file. `number` counts from 1: the line of a JSONL file, the element of a JSON list, the
    record below a CSV's header, the row of a Parquet or Arrow file."""

    fields: dict[str, Any]
    file: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Bad:
    """A row that cannot be read. `reason` is the same text for every such row, so that it can be counted; `detail` is
    what differs, such as the byte."""

    file: str
    number: int
    reason: str
    detail: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


class Skip(Exception):
    """A row that was read and cannot be used; its text is the reason, the same for every such row.

    `bad` is False for a sound row that the stage does not want, such as one labelled as a poor reply.
    """

    def __init__(self, reason: str, *, bad: bool = True) -> None:
        self.bad = bad
        super().__init__(reason)


_KINDS = {
    type(None): "nothing",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
}


def kind(value: Any) -> str:
    """What a value is, in the words of an error message."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")
