"""The tables of docs/migrate_*.md: every key they name is one of the schema, every flag of DeepSpeed-Chat is in them."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from pipeline.config.kinds import KINDS
from pipeline.config.schema import Header

DOCS = Path(__file__).resolve().parents[2] / "docs"
FLAGS = Path(__file__).with_name("deepspeed_chat_flags.txt")
CHAT = DOCS / "migrate_deepspeed_chat.md"
SECTIONS = {
    "step1": "Steps 1 and 2",
    "step2": "Steps 1 and 2",
    "dpo": "Step 2'",
    "step3": "Step 3",
    "e2e": "`e2e_rlhf.py`",
}
"""Program -> how the section of its flags begins."""

pytestmark = pytest.mark.fast


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of the tables of a page, headings apart."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and not set(line) <= set("|- "):
            yield cells


def keys(page: Path) -> list[str]:
    """What the second column names."""
    found = [cells[1] for cells in rows(page.read_text(encoding="utf-8")) if cells[1] not in ("key", "—")]
    assert all(re.fullmatch(r"`[\w.]+`", key) for key in found), found
    return [key.strip("`") for key in found]


def models(annotation: Any) -> list[type[BaseModel]]:
    """The models among what an annotation admits, items of lists included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, Union, types.UnionType, Annotated):
        return [model for part in get_args(annotation) for model in models(part)]
    return []


def exists(key: str) -> bool:
    """Whether a recipe may have this key; a stage is called as its kind."""
    first, *rest = key.split(".")
    at: list[type[BaseModel]] = [Header]
    if first == "stages":
        at, rest = [KINDS[rest[0]].schema], rest[1:]
    else:
        rest = [first, *rest]
    for name in rest:
        fields = [model.model_fields[name] for model in at if name in model.model_fields]
        if not fields:
            return False
        at = [model for field in fields for model in models(field.annotation)]
    return True


@pytest.mark.parametrize("page", sorted(DOCS.glob("migrate_*.md")), ids=lambda page: page.stem)
def test_every_key_is_in_the_schema(page: Path) -> None:
    named = keys(page)
    assert len(named) > 40
    assert [key for key in named if not exists(key)] == []


def test_what_is_no_key_is_told_apart() -> None:
    assert not exists("stages.ppo.kl.coeff")
    assert not exists("base.models")
    assert exists("stages.ppo.ptx.data.subset")


def test_every_flag_of_deepspeed_chat_is_covered() -> None:
    parts = re.split(r"^## ", CHAT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = {
        program: {
            flag
            for part in parts
            if part.startswith(head)
            for cells in rows(part)
            for flag in re.findall(r"--[\w-]+", cells[0])
        }
        for program, head in SECTIONS.items()
    }
    lines = [line.split() for line in FLAGS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [(program, flag) for program, flag in lines if flag not in listed[program]] == []


def test_what_has_no_key_says_why() -> None:
    """A row without a key has a note, unless an earlier row of the same flag has it."""
    for page in DOCS.glob("migrate_*.md"):
        explained: set[str] = set()
        for flag, key, note in rows(page.read_text(encoding="utf-8")):
            assert key != "—" or note or flag in explained or flag in ("flag", "field"), (page.name, flag)
            explained |= {flag} if note else set()
