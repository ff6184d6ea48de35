"""Testing reward models on ranks: the stage's own held-out accuracy, plain forwards, ensembles, other kinds of pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.stages.test_pretrain import recipe
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"
BASE = tiny.QUICKSTART / "base"
PAIRS = [{"path": str(tiny.QUICKSTART / "preferences.jsonl"), "limit": 400}]
REWARD = {"kind": "reward", "data": PAIRS, "steps": 6, "batch": 16, "lr": 1e-2, "eval_rows": 8}


@pytest.fixture(scope="module")
def run(ranks: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models, one trained whole, a classifier from outside, and pairs that say less."""
    folder = tmp_path_factory.mktemp("rewards")
    rows = [json.loads(line) for line in (tiny.QUICKSTART / "preferences.jsonl").read_text().splitlines()[400:430]]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (folder / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
    model.save_pretrained(folder / "outside")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "outside")
    outside = {"model": str(folder / "outside"), "dtype": "fp32"}
    stages: dict[str, Any] = {
        "reward": REWARD,
        "whole": {**REWARD, "seed": 1, "lr": 1e-3, "adapter": {"method": "full"}},
        "test": {
            "kind": "evaluate",
            "micro_batch": 4,
            "reward_model": {
                "of": ["reward", "whole", outside],
                "data": PAIRS,
                "ood": [{"path": str(folder / "swapped.jsonl")}],
            },
        },
    }
    recipe(folder, BASE, stages)
    for stage in stages:
        ranks(2).call(RUN, recipe=str(folder / "domain.yaml"), stage=stage, run_dir=str(folder / "run"))
    return folder / "run"


def metrics(run: Path, stage: str) -> dict[str, float]:
    return dict(json.loads((run / stage / "output" / "manifest.json").read_text())["metrics"])


def table(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "test" / "output" / name).read_text().splitlines()]


@pytest.mark.parametrize("stage", ["reward", "whole"])
def test_the_accuracy_is_what_training_said(run: Path, stage: str) -> None:
    trained, tested = metrics(run, stage), metrics(run, "test")
    assert tested[f"reward_model/{stage}/pairs"] == trained["held_out/pairs"]
    assert tested[f"reward_model/{stage}/accuracy"] == pytest.approx(trained["held_out/accuracy"])
    assert tested[f"reward_model/{stage}/longer"] == pytest.approx(trained["held_out/longer_reply_accuracy"])


def test_a_model_from_outside_scores_as_a_plain_forward_does(run: Path) -> None:
    folder = run.parent / "outside"
    model, tok = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    row = json.loads((run.parent / "swapped.jsonl").read_text().splitlines()[0])
    found = next(pair for pair in table(run, "pairs.jsonl") if pair["set"] == "ood")
    for place, side in enumerate(("chosen", "rejected")):
        ids = (
            tok(row["prompt"])["input_ids"] + tok(row[side], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        )
        with torch.no_grad():
            score = float(model(torch.tensor([ids])).logits)
        assert found["scores"]["outside"][place] == pytest.approx(score, abs=1e-5)


def test_pairs_that_say_the_opposite(run: Path) -> None:
    """What the model prefers is what it was taught, and these pairs call it wrong."""
    found, rows = metrics(run, "test"), [pair for pair in table(run, "pairs.jsonl") if pair["set"] == "ood"]
    right = [sum(pair["scores"]["reward"][0] > pair["scores"]["reward"][1] for pair in rows) / len(rows)]
    assert found["reward_model/reward/ood/accuracy"] == pytest.approx(right[0])
    drop = found["reward_model/reward/accuracy"] - found["reward_model/reward/ood/accuracy"]
    assert found["reward_model/reward/ood/drop"] == pytest.approx(drop)
    assert found["reward_model/reward/ood/accuracy"] < 0.5 < found["reward_model/reward/accuracy"]


def test_the_ensemble_is_the_mean(run: Path) -> None:
    for pair in table(run, "pairs.jsonl"):
        members = [pair["scores"][name] for name in ("reward", "whole", "outside")]
        means = [sum(scores) / 3 for scores in zip(*members, strict=True)]
        assert pair["scores"]["ensemble"] == pytest.approx(means)
    assert 0 <= metrics(run, "test")["reward_model/ensemble/agreement"] <= 1


def test_tables_cover_every_pair(run: Path) -> None:
    pairs = metrics(run, "test")["reward_model/reward/pairs"]
    for name in ("reliability.jsonl", "buckets.jsonl"):
        rows = [row for row in table(run, name) if (row["model"], row["set"]) == ("reward", "held out")]
        assert sum(row["pairs"] for row in rows) == pairs


def test_the_same_on_one_rank(ranks: Get, run: Path, tmp_path: Path) -> None:
    import shutil

    alone = tmp_path / "run"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("test", ".scores"))
    shutil.copy(run.parent / "domain.yaml", tmp_path)
    ranks(1).call(RUN, recipe=str(tmp_path / "domain.yaml"), stage="test", run_dir=str(alone))
    for name in ("results.json", "reliability.jsonl", "buckets.jsonl", "pairs.jsonl"):
        assert (alone / "test/output" / name).read_bytes() == (run / "test/output" / name).read_bytes()
