"""Where the tests of reading find real data, and a writer of small recipes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.recipe import Recipe, load


@pytest.fixture
def hh_rlhf(test_data: Path) -> Path:
    """The folder of HH-RLHF's four test splits; the test is skipped where it is absent."""
    folder = test_data / "hh-rlhf"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set RELAY_TEST_DATA")
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a loaded recipe of three stages that read `rows.jsonl` beside it with shares 0.2, 0.4 and 0.4, and of an evaluate
    stage where anything is held out."""

    def make(
        holdout: float = 0.2, path: str = "rows.jsonl", split: dict[str, float] | None = None, **changes: dict[str, Any]
    ) -> Recipe:
        stages: dict[str, dict[str, Any]] = {
            "sft": {"kind": "sft", "lr": 1e-4, "data": [{"path": path, "share": 0.2}]},
            "reward": {"kind": "reward", "lr": 1e-4, "data": [{"path": path, "share": 0.4}]},
            "ppo": {
                "kind": "ppo",
                "policy": "sft",
                "reward": "reward",
                "lr": 1e-5,
                "steps": 1,
                "prompts": [{"path": path, "share": 0.4}],
            },
        }
        if holdout:
            stages["evaluate"] = {"kind": "evaluate", "model": "ppo", "against": "sft", "prompts": [{"path": path}]}
        for stage, block in changes.items():
            stages.setdefault(stage, {}).update(block)
        file = tmp_path / "recipe.yaml"
        text = {
            "name": "split",
            "base": {"model": "m"},
            "data": {"holdout": holdout, "split": split or {}},
            "stages": stages,
        }
        file.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
        return load(file)

    return make
