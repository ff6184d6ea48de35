"""What a recipe may not say of chat templates and added tokens; free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import chain
from pipeline.config.recipe import load
from pipeline.errors import UserError
from tests.support import tiny

pytestmark = pytest.mark.fast


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as told:
        load(tiny.recipe(folder / "r.yaml", folder, **changes))
    return str(told.value)


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    found = refused(tmp_path, base__chat_template="chatlm")
    assert "stages.sft.base.chat_template" in found
    assert "write `chatml`" in found
    assert "mine.jinja" in refused(tmp_path, base__chat_template="mine.jinja")


def test_stages_of_two_templates_or_vocabularies(tmp_path: Path) -> None:
    found = refused(tmp_path, stages__ppo__base={"chat_template": "chatml"})
    assert "stages.ppo.base.chat_template: 'chatml', and its upstream stage sft has None" in found
    found = refused(tmp_path, base__add_tokens=["<|tool|>"], stages__ppo__base={"add_tokens": []})
    assert "stages.ppo.base.add_tokens" in found


def test_a_method_that_trains_no_rows_names_one_that_does(tmp_path: Path) -> None:
    changes = {"base__add_tokens": ["<|tool|>"], "adapter": {"method": "vera"}}
    found = refused(tmp_path, **changes)
    assert "stages.sft.adapter.method: vera with added tokens (<|tool|>)" in found
    assert "method: lora" in found
    for method in ("lora", "dora", "full"):
        load(tiny.recipe(tmp_path / "r.yaml", tmp_path, **{**changes, "adapter": {"method": method}}))


def test_an_edited_template_file_is_other_work(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "config.json"):
        (base / name).write_bytes(b"{}")
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    recipe = load(tiny.recipe(tmp_path / "r.yaml", base, base__chat_template="mine.jinja"))
    before = chain.key(chain.inputs(recipe, "sft", tmp_path))
    assert chain.key(chain.inputs(recipe, "sft", tmp_path)) == before
    (tmp_path / "mine.jinja").write_text("{{ messages }}{{ eos_token }}")
    assert chain.key(chain.inputs(recipe, "sft", tmp_path)) != before
