"""What pages of results have in common: where they were measured, and sections that several scripts write one each of."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path


def measured_on(*libraries: str) -> str:
    """The machine and the versions of a measurement, for the sentence that opens a page."""
    versions = ", ".join(f"{library} {version(library)}" for library in libraries)
    cores = f"on {os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{cores}, Python {platform.python_version()}, {versions}"


def put(page: Path, heading: str, text: str) -> None:
    """Replace what stands under a heading of a page, up to the next heading of any rank; append both where it has none.

    What a script cannot write, such as what its numbers say, has a heading of its own and so stays.
    """
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    start = lines.index(heading) if heading in lines else len(lines)
    end = next((place for place in range(start + 1, len(lines)) if lines[place].startswith("#")), len(lines))
    before = [*lines[:start], ""] if start == len(lines) > 0 else lines[:start]
    after = ["", *lines[end:]] if lines[end:] else []
    page.write_text("\n".join([*before, heading, "", text.rstrip("\n"), *after]) + "\n", encoding="utf-8")


def others(page: Path, own: Collection[str]) -> str:
    """What a page ends with, from its first section (`## ...`) on that is not one of `own`, after an empty line; nothing
    where there is none."""
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True) if page.is_file() else []
    start = next((n for n, line in enumerate(lines) if line.startswith("## ") and line[3:].strip() not in own), None)
    return "" if start is None else "\n" + "".join(lines[start:])
