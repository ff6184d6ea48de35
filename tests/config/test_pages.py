"""Pages of results that several scripts write: each leaves to the others, and to people, what is theirs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
PAGES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pages.py"))
PAGE = "# Page\n\nTop.\n\n## a\n\n1\n\n## What it says\n\nWords.\n\n## b\n\n2\n\n### What it says\n\nMore.\n"


def test_a_section_is_replaced_up_to_the_next_heading(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    PAGES["put"](page, "## b", "3\n\n4\n")
    assert page.read_text(encoding="utf-8") == PAGE.replace("2\n", "3\n\n4\n")


def test_a_new_section_is_appended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    PAGES["put"](page, "## a", "1")
    PAGES["put"](page, "## b", "2")
    assert page.read_text(encoding="utf-8") == "## a\n\n1\n\n## b\n\n2\n"


def test_what_others_wrote_begins_with_their_first_section(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert PAGES["others"](page, ["a"]) == ""
    page.write_text(PAGE, encoding="utf-8")
    assert PAGE.endswith("1\n" + PAGES["others"](page, ["a"]))
    assert PAGES["others"](page, ["a"]).startswith("\n## What it says\n")
    assert PAGES["others"](page, ["a", "b", "What it says"]) == ""
