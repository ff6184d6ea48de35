"""Testing reward models on ranks: the stage's own held-out accuracy, plain forwards, ensembles, other kinds of pairs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.recipe import load
from pipeline.errors import Trouble
from pipeline.summary import summary
from stages.evaluate.reward_model import check_finite
from tests.stages.test_pretrain import recipe
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"
BASE = tiny.QUICKSTART / "base"
SOURCES = {"colours": slice(200), "ood": slice(200, 300)}
"""Files of pairs by name, the second called as the pairs of another kind are, and which of the quickstart's rows they hold."""


@pytest.fixture(scope="module")
def run(ranks: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models, one trained whole, a classifier from outside, and pairs that say the opposite."""
    folder = tmp_path_factory.mktemp("rewards")
    rows = [json.loads(line) for line in (tiny.QUICKSTART / "preferences.jsonl").read_text().splitlines()]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[400:430]]
    files = {name: rows[part] for name, part in SOURCES.items()} | {"swapped": swapped}
    for name, found in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
    model.save_pretrained(folder / "outside")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "outside")
    data = [{"path": f"{name}.jsonl"} for name in SOURCES]
    reward = {"kind": "reward", "data": data, "steps": 6, "batch": 16, "lr": 1e-2, "eval_rows": 8}
    of = ["reward", "whole", {"model": "outside", "dtype": "fp32"}]
    asked = {"of": of, "data": data, "ood": [{"path": "swapped.jsonl"}]}
    stages: dict[str, Any] = {
        "reward": reward,
        "whole": {**reward, "seed": 1, "lr": 1e-3, "adapter": {"method": "full"}},
        "test": {"kind": "evaluate", "micro_batch": 4, "reward_model": asked},
    }
    short = {**asked, "max_length": 5}
    recipe(folder, BASE, stages | {"short": {"kind": "evaluate", "reward_model": short}})
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
    for source in SOURCES:
        for name in ("accuracy", "pairs"):
            expected = trained[f"held_out/{source}/{name}"]
            assert tested[f"reward_model/{stage}/source/{source}/{name}"] == pytest.approx(expected)


@pytest.mark.parametrize(("name", "folder"), [("outside", "outside"), ("whole", "run/whole/output")])
def test_scores_are_those_of_plain_forwards(run: Path, name: str, folder: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run.parent / folder).eval()
    tok = AutoTokenizer.from_pretrained(run.parent / folder)
    row = json.loads((run.parent / "swapped.jsonl").read_text().splitlines()[0])
    found = next(pair for pair in table(run, "pairs.jsonl") if pair["set"] == "ood")
    for place, side in enumerate(("chosen", "rejected")):
        ids = (
            tok(row["prompt"])["input_ids"] + tok(row[side], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        )
        with torch.no_grad():
            score = float(model(torch.tensor([ids])).logits)
        assert found["scores"][name][place] == pytest.approx(score, abs=1e-5)


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


def test_what_is_read_is_known(run: Path) -> None:
    """A model from outside by its content; every row of every list of pairs."""
    manifest = json.loads((run / "test" / "output" / "manifest.json").read_text())
    assert manifest["inputs"]["outside"].keys() == {"reward_model.of.2"}
    assert [(data["path"], data["rows"], data["for"]) for data in manifest["data"]] == [
        ("colours.jsonl", 200, "reward_model.data"),
        ("ood.jsonl", 100, "reward_model.data"),
        ("swapped.jsonl", 30, "reward_model.ood"),
    ]


def test_the_summary_has_a_line_for_each(run: Path) -> None:
    shown = StringIO()
    summary(load(run.parent / "domain.yaml"), run, ["test"], Console(file=shown, width=200))
    found = metrics(run, "test")
    for name in ("reward", "whole", "outside", "ensemble", "reward/ood", "reward/source/colours"):
        accuracy = f"{found[f'reward_model/{name}/accuracy']:.3f}"
        assert re.search(rf" {name}, pairwise accuracy .* {accuracy} \(", shown.getvalue()), shown.getvalue()
    agreement = f"{found['reward_model/ensemble/agreement']:.3f}"
    assert re.search(rf" ensemble, members agree on .* {agreement}", shown.getvalue())


def test_a_score_that_is_no_number_is_told() -> None:
    with pytest.raises(Trouble, match="judge scores pair 2 of 3 nan and 1"):
        check_finite("judge", [[0.0, 1.0], [float("nan"), 1.0], [2.0, 1.0]])


def test_no_pair_is_short_enough(ranks: Get, run: Path) -> None:
    asked = {"recipe": str(run.parent / "domain.yaml"), "stage": "short", "run_dir": str(run)}
    told = ranks(2).call("tests.support.stages:refused", **asked)
    assert all("stages.short.reward_model.data: no held-out pair" in text for text in told), told


def test_the_same_on_one_rank(ranks: Get, run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "run"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("test", ".scores"))
    for file in ("domain.yaml", "colours.jsonl", "ood.jsonl", "swapped.jsonl"):
        shutil.copy(run.parent / file, tmp_path)
    shutil.copytree(run.parent / "outside", tmp_path / "outside")
    ranks(1).call(RUN, recipe=str(tmp_path / "domain.yaml"), stage="test", run_dir=str(alone))
    for name in ("results.json", "reliability.jsonl", "buckets.jsonl", "pairs.jsonl"):
        assert (alone / "test/output" / name).read_bytes() == (run / "test/output" / name).read_bytes()
