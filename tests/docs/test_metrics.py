"""docs/metrics.md names every metric in the sources of the stages; test_commands.py asks it of those that a real run logged."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "metrics.md"


def documented() -> list[str]:
    """Every name that the page gives, `<x>` for any part of one."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def missing(names: set[str]) -> list[str]:
    """The names that the page does not give."""
    given = documented()
    page = re.compile("|".join(f"(?:{pattern(name, '<[^>]+>')}(_low|_high)?)" for name in given))
    return sorted(name for name in names if not page.fullmatch(name) and not any(ends(full, name) for full in given))


def pattern(name: str, wild: str) -> str:
    return ".+".join(map(re.escape, re.split(wild, name)))


def ends(full: str, part: str) -> bool:
    """Whether the documented name `full` ends in `part`, where an X stands for anything."""
    wanted = part.split("/")
    tail = full.split("/")[-len(wanted) :]
    return len(tail) == len(wanted) and "X" in part and all(map(fits, tail, wanted))


def fits(known: str, wanted: str) -> bool:
    return bool(re.fullmatch(pattern(wanted, "X"), known) or re.fullmatch(pattern(known, "<[^>]+>"), wanted))


def literal(node: ast.expr | None) -> str | None:
    """The text of a string, with X for each expression inside it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return None


def named(source: str) -> Iterator[str]:
    """Keys of dictionaries in `source` that have the form of a metric's name, with a word of their own."""
    for node in ast.walk(ast.parse(source)):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = [key for key, value in zip(node.keys, node.values, strict=True) if not isinstance(value, ast.List)]
        elif isinstance(node, ast.DictComp):
            keys = [node.key]
        elif isinstance(node, ast.Assign):
            keys = [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
        for key in keys:
            text = literal(key)
            if text and re.fullmatch(r"[\w@<>]+(/[\w@<>]+)+", text) and set(text.split("/")) != {"X"}:
                yield text


@pytest.mark.fast
def test_every_name_in_the_stages_is_documented() -> None:
    names = {name for file in (ROOT / "stages").rglob("*.py") for name in named(file.read_text(encoding="utf-8"))}
    assert {"objective/kl", "held_out/accuracy", "rewards/margins", "weight/X", "time/X"} <= names
    assert missing(names) == []


@pytest.mark.fast
def test_a_name_that_is_not_there_is_missing() -> None:
    assert missing({"objective/klx", "objective/kl", "eval/score"}) == ["objective/klx"]
