"""Files to rows: JSON, JSONL (both also `.gz`), CSV, Parquet, folders, globs and hub ids. Torch-free."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

csv.field_size_limit(sys.maxsize)  # the module's default is 128 KiB, less than a long document
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file. `number` counts from 1: the line of a JSONL file, the element of a JSON list."""

    fields: dict[str, Any]
    file: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


def files(path: str) -> list[Path]:
    """The data files `path` names (a file, a folder's files, or a glob), sorted; empty when it names nothing local."""
    place = Path(path)
    if place.is_file():
        return [place]
    found = (
        [p for p in place.rglob("*") if p.is_file()]
        if place.is_dir()
        else [Path(p) for p in glob.glob(path, recursive=True)]
    )
    return sorted(p for p in found if p.name.endswith(SUFFIXES))


def fingerprint(path: str) -> str:
    """sha256 over the bytes of the files of `path`; of the name itself for a hub id."""
    hasher = hashlib.sha256()
    found = files(path)
    for file in found:
        hasher.update(file_hash(file).encode())
    if not found:
        hasher.update(path.encode())
    return hasher.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes. A hub cache names large files by their sha256: that name is taken instead of reading."""
    target = path.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    hasher = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        hasher.update(chunk)
    return hasher.hexdigest()


def rows(path: str) -> Iterator[Row]:
    """Every row of `path`. Raises UserError for a missing or unreadable file, naming the file and the row."""
    found = files(path)
    if found:
        for file in found:
            yield from _file_rows(file)
    elif path.count("/") == 1 and not path.startswith((".", "/")) and not path.endswith(SUFFIXES) and "*" not in path:
        yield from _hub_rows(path)
    else:
        raise UserError(
            f"data {path}",
            "no such file, folder or glob",
            expected="a readable file ending in " + ", ".join(SUFFIXES),
            fix="check the path; it is relative to the recipe file",
        )


def _file_rows(file: Path) -> Iterator[Row]:
    name = str(file)
    try:
        if name.endswith(".csv"):
            with file.open(encoding="utf-8-sig", newline="") as stream:  # Excel writes a byte-order mark
                for number, fields in enumerate(csv.DictReader(stream), 1):
                    if None in fields:
                        raise UserError(
                            f"data {name}, row {number}",
                            f"{len(fields[None])} more cells than columns",
                            expected="one cell per column",
                            fix="quote cells that hold commas",
                        )
                    yield Row(dict(fields), name, number)
        elif name.endswith(".parquet"):
            for number, fields in enumerate(_parquet(file), 1):
                yield Row(fields, name, number)
        else:
            with (
                gzip.open(file, "rt", encoding="utf-8") if name.endswith(".gz") else file.open(encoding="utf-8") as text
            ):
                yield from json_rows(text.read(), name)
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"data {name}", f"cannot be read: {error}", fix="replace or re-download the file") from None


def _parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        return list(parquet.read_table(file).to_pylist())
    except arrow.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from None


def json_rows(text: str, name: str) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        try:
            elements = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"data {name}, line {error.lineno}", f"not valid JSON: {error.msg}") from None
        numbered: Iterator[tuple[int, Any]] = enumerate(elements, 1)
    else:
        # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
        numbered = ((n, _line(line, name, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, fields in numbered:
        if not isinstance(fields, dict):
            raise UserError(f"data {name}, row {number}", f"found {type(fields).__name__}", expected="a JSON object")
        yield Row(fields, name, number)


def _line(line: str, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"data {name}, row {number}", f"not valid JSON: {error.msg}", fix="mend or remove the row"
        ) from None


def _hub_rows(path: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, split="train")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data {path}",
            f"no such local file, and the hub did not give it: {reason}",
            fix="check the spelling and the network, or give a local file",
        ) from None
    for number, fields in enumerate(dataset, 1):
        yield Row(fields, path, number)
