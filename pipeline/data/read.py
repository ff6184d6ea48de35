"""Paths to rows: files, folders, globs and hub ids. Torch-free; the formats are in `formats` and `columnar`."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.formats import DOCUMENTS, SUFFIXES, file_rows
from pipeline.data.row import Bad as Bad
from pipeline.data.row import Row as Row
from pipeline.errors import UserError

DICTIONARY = "dataset_dict.json"
BESIDE = {DICTIONARY, "dataset_info.json", "state.json"}
"""What `save_to_disk` of the `datasets` library writes beside its Arrow files."""


def files(path: str, split: str = "train") -> list[Path]:
    """The data files `path` names (a file, a folder's files, or a glob), sorted; empty when it names nothing local.

    Of a folder that `datasets` saved with several splits, the files of `split`. Text files in a folder are its data if there
    is nothing else; beside other data they are notes.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        if (place / DICTIONARY).is_file():
            place /= split
        found = [p for p in place.rglob("*") if not any(part.startswith(".") for part in p.relative_to(place).parts)]
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True)]
    found = sorted(p for p in found if p.name.lower().endswith(SUFFIXES) and p.name not in BESIDE and p.is_file())
    rows_only = [p for p in found if not p.name.lower().endswith(DOCUMENTS)] if place.is_dir() else []
    return rows_only or found


def is_hub_id(path: str) -> bool:
    """Whether a path that names nothing local is written like a dataset on the hub: `owner/name`."""
    return (
        path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.lower().endswith(SUFFIXES)
    ) and not any(mark in path for mark in "*?[")


def rows(
    path: str, revision: str | None = None, split: str = "train", subset: str | None = None
) -> Iterator[Row | Bad]:
    """Every row of `path`, streamed. `revision` and `subset` are a hub id's; `split` also that of a folder saved with several.

    Raises UserError for what is missing or cannot be read at all.
    """
    found = files(path, split)
    if found:
        for file in found:
            yield from file_rows(file)
    elif is_hub_id(path) and not Path(path).exists():
        yield from _hub_rows(path, revision, split, subset)
    else:
        raise UserError(
            f"data {path}",
            f"no data file of split {split} in it" if Path(path).exists() else "no such file, folder or glob",
            expected="a readable file ending in " + ", ".join(SUFFIXES),
            fix="check the path; it is relative to the recipe file",
        )


def fingerprint(path: str, revision: str | None = None, split: str = "train", subset: str | None = None) -> str:
    """sha256 over the bytes of the files of `path`; of name, revision, split and subset for a hub id."""
    found = files(path, split)
    if not found:
        return hub_fingerprint(path, revision, split, subset)
    hasher = hashlib.sha256()
    for file in found:
        hasher.update(file_hash(file).encode())
    return hasher.hexdigest()


def hub_fingerprint(path: str, revision: str | None = None, split: str = "train", subset: str | None = None) -> str:
    """The fingerprint of a hub id, whatever lies under that name here."""
    hasher = hashlib.sha256(path.encode())
    if (revision, split, subset) != (None, "train", None):
        hasher.update(f"\0{revision or ''}\0{split}\0{subset or ''}".encode())
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


def inside(path: str, root: Path, where: str) -> None:
    """Refuse a path, or a file it names, that does not lie in the folder `root`; links are followed, hub ids let through.

    For recipes that one does not trust. `where` names the recipe's key in the error.
    """
    allowed = root.resolve()
    found = [Path(path), *files(path)]
    if len(found) == 1 and not os.path.lexists(path) and is_hub_id(path) and ".." not in Path(path).parts:
        return
    for place in found:
        # A glob is no place: what it begins with is.
        fixed = Path(*_before_glob(place.parts)) if place == found[0] else place
        if not fixed.resolve().is_relative_to(allowed):
            raise UserError(
                where,
                f"{path} is outside {allowed}" if place == found[0] else f"{place} leads outside {allowed}",
                expected="data inside the folder that was allowed",
                fix="copy the data there, or allow its folder",
            )


def _before_glob(parts: tuple[str, ...]) -> tuple[str, ...]:
    for number, part in enumerate(parts):
        if glob.has_magic(part):
            return parts[:number]
    return parts


def _hub_rows(path: str, revision: str | None, split: str, subset: str | None) -> Iterator[Row]:
    number = 0
    try:
        for number, fields in enumerate(_hub(path, revision, split, subset), 1):
            yield Row(fields, path, number)
    except UserError:
        raise
    except Exception as error:  # the library raises what its parts raise: OSError, ValueError, httpx's and its own
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"data {path}",
            f"the hub gave {number} rows and then failed: {lines[0]}"
            if number
            else f"no such local file, and the hub did not give it: {lines[0]}",
            fix="check spelling, revision, split and network; give a local file; or, if it was downloaded before, "
            "set HF_HUB_OFFLINE=1",
        ) from None


def _hub(path: str, revision: str | None, split: str, subset: str | None) -> Iterator[dict[str, Any]]:
    """A hub dataset's rows: streamed; or, where HF_HUB_OFFLINE is set, from the copy that was downloaded earlier."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        HfApi().dataset_info(path, revision=revision, timeout=10)  # says what is wrong at once; datasets tries for long
    return iter(load_dataset(path, subset, split=split, revision=revision, streaming=not offline))
