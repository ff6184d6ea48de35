"""The commands in a page: blocks to run as they stand, and those marked `<!-- needs: … -->`, which are only parsed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NEEDS = {"cluster", "converter", "data", "gpu", "hub", "names", "network", "terminal", "time"}
"""What a block may need that a test has not; `names`: it holds placeholders. After a colon a mark may say more."""
STARTS = ("relay ", "python scripts/", "./scripts/", "deepspeed ", "echo ")
SHELLS = ("sh", "bash", "console", "shell")
OPEN = re.compile(r"^( *)(```+)(\w*)[^`]*$")
MARK = re.compile(r"^ *<!-- needs: (.+?) -->$")
SPAN = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python scripts/|\./scripts/)[^`]+)`")


@dataclass
class Block:
    """Fenced lines with commands in them. `needs` is empty where they are to be run."""

    line: int
    language: str
    needs: set[str]
    lines: list[str] = field(default_factory=list)

    @property
    def commands(self) -> list[str]:
        """Its lines that are commands, continuation lines joined."""
        joined = re.sub(r"\\\n\s*", " ", "\n".join(self.lines)).splitlines()
        return [line.removeprefix("$ ") for line in joined if line.removeprefix("$ ").startswith(STARTS)]

    @property
    def typed(self) -> bool:
        return self.language in SHELLS or bool(self.commands)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are typed into a shell."""
    found: list[Block] = []
    marked: set[str] = set()
    fence = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence = ""
            else:
                found[-1].lines.append(line)
        elif opened := OPEN.match(line):
            fence = opened[2]
            found.append(Block(number, opened[3], marked))
            marked = set()
        elif mark := MARK.match(line):
            marked = set(re.split(r", *| and ", mark[1].partition(":")[0]))
        elif line.strip():
            marked = set()
    assert not fence, f"{page.name}: a block is not closed"
    return [block for block in found if block.typed]


def loose(page: Path) -> list[str]:
    """Lines outside blocks that begin with a command, and scripts that are called in running text."""
    text = re.sub(r"^( *)(```+)\w*.*?^ *\2 *$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\\\n\s*", " ", text)
    plain = [line.strip() for line in joined.splitlines() if line.strip().startswith(STARTS)]
    return plain + [span for span in SPAN.findall(joined) if span not in plain]


def words(command: str) -> list[str]:
    """The words of a command: comments, variables set before it and the brackets of a synopsis apart."""
    plain = re.sub(r"[\[\]…]|\.\.\.(?= |$|\])", " ", command) if re.search(r"\[(?!\{)[-A-Z]", command) else command
    found = shlex.split(plain, comments=True)
    while re.match(r"[A-Z_]+=", found[0]):
        found.pop(0)
    return found


def marked(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of every command of a page that is not run: of marked blocks, and outside blocks."""
    for block in blocks(page):
        if block.needs:
            yield from ((block.line, words(command)) for command in block.commands)
    yield from ((0, words(command)) for command in loose(page))
