"""Relay's trainers leave TRL's `__init__` out: whatever a version of TRL sets there must be set here too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from stages.preference.reference import Rows
from stages.preference.trainers import PairTrainer, ReplyTrainer, prepare
from tests.support import tiny

PAIR = {"prompt": "What?", "chosen": " A lamp.", "rejected": " Nothing."}
REPLY = {"prompt": "What?", "completion": " A lamp.", "label": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("trainers") / "base", "llama_small")


@pytest.mark.parametrize(
    ("theirs", "ours", "config", "row"),
    [(DPOTrainer, PairTrainer, DPOConfig, PAIR), (KTOTrainer, ReplyTrainer, KTOConfig, REPLY)],
)
def test_all_that_trl_sets(base: Path, tmp_path: Path, theirs: Any, ours: Any, config: Any, row: Any) -> None:
    arguments = config(
        str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2, bf16=False, max_length=None
    )
    given = {"args": arguments, "processing_class": AutoTokenizer.from_pretrained(base)}
    rows = Dataset.from_list([row] * 4)
    trl = theirs(model=AutoModelForCausalLM.from_pretrained(base), train_dataset=rows, **given)
    model = AutoModelForCausalLM.from_pretrained(base)
    prepare(model, arguments)
    relay = ours(model=model, train_dataset=Rows(rows, {}), data_collator=trl.data_collator, **given)
    assert vars(trl).keys() - vars(relay).keys() == set()
    same = [name for name in vars(relay) if isinstance(vars(trl).get(name), int | float | str | list | type(None))]
    told = {name: (vars(trl)[name], vars(relay)[name]) for name in same if vars(trl)[name] != vars(relay)[name]}
    told.pop("precompute_ref_logps")  # the rows hold the reference's
    assert told == {}
