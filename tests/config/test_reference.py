"""docs/recipe.md is what the schema says now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.fast
def test_recipe_reference_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))["page"]()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page, "run python scripts/recipe_reference.py"


@pytest.mark.fast
def test_stages_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))["stages"]()
    assert (ROOT / "docs" / "stages.md").read_text(encoding="utf-8") == page, "run python scripts/recipe_reference.py"


@pytest.mark.fast
def test_methods_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))["methods"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page, "run python scripts/recipe_reference.py"
