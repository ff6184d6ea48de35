"""What a recipe may ask of dpo and kto, and which stages may follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import load
from pipeline.errors import UserError
from tests.support import tiny

pytestmark = pytest.mark.fast

DPO: dict[str, Any] = {"kind": "dpo", "init": "sft", "data": [{"path": "pairs.jsonl"}], "lr": 1e-5, "batch": 8}
KTO: dict[str, Any] = {**DPO, "kind": "kto"}


@pytest.mark.parametrize(
    "changes",
    [
        {"stages__dpo": DPO},
        {"stages__dpo": {**DPO, "init": "base", "loss": "robust", "label_smoothing": 0.1}},
        {"stages__dpo": {**DPO, "loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0}},
        {"stages__dpo": {**DPO, "loss": "cpo", "cpo_alpha": 0.5}},
        {"stages__kto": KTO, "stages__ppo__policy": "kto"},
        {"stages__dpo": DPO, "stages__kto": {**KTO, "init": "dpo"}},
        {"stages__kto": {**KTO, "loss": "apo_zero_unpaired", "micro_batch": 1}},
    ],
)
def test_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    load(tiny.recipe(tmp_path / "r.yaml", tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages__dpo": {**DPO, "label_smoothing": 0.5}}, "stages.dpo.label_smoothing"),
        ({"stages__dpo": {**DPO, "loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing belongs to loss sigmoid or"),
        ({"stages__dpo": {**DPO, "loss": "orpo", "simpo_gamma": 1.0}}, "simpo_gamma belongs to loss simpo"),
        ({"stages__dpo": {**DPO, "loss": "dpo"}}, "stages.dpo.loss"),
        ({"stages__dpo": {**DPO, "init": "reward"}}, 'stage "reward" is of kind reward'),
        ({"stages__kto": {**KTO, "micro_batch": 1}}, "stages.kto.micro_batch: kto estimates its KL term"),
        ({"stages__kto": {**KTO, "batch": 2}}, "stages.kto.micro_batch: kto estimates its KL term"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        load(tiny.recipe(tmp_path / "r.yaml", tmp_path, **changes))
    assert words in str(refused.value)
