"""Pages of results that several scripts write a section of each."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, heading: str, text: str) -> None:
    """Replace the section `heading` (`## ...`) of a page, up to the next heading of its rank or the end; append it where
    there is none."""
    lines = page.read_text(encoding="utf-8").split("\n") if page.is_file() else []
    start = lines.index(heading) if heading in lines else len(lines)
    rank = heading.split(" ")[0] + " "
    end = next((n for n in range(start + 1, len(lines)) if lines[n].startswith(rank)), len(lines))
    fresh = [*lines[:start], heading, "", *text.rstrip("\n").split("\n"), "", *lines[end:]]
    page.write_text("\n".join(fresh).rstrip("\n") + "\n", encoding="utf-8")


def rest(page: Path, heading: str) -> str:
    """A page from a heading on, after an empty line; nothing where it has none."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    _, found, after = text.partition(f"\n{heading}\n")
    return f"\n{heading}\n{after}" if found else ""
