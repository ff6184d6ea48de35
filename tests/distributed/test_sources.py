"""A chain over two sources, in two ranks: mixed, packed, and told apart in every stage's metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.handoff import read_manifest
from tests.support import tiny
from tests.support.session import Ranks

NAMES = ("first", "second")


class Case:
    def __init__(self, ranks: Ranks, recipe: Path, run: Path) -> None:
        self.ranks, self.recipe, self.dir = ranks, recipe, run

    def call(self, function: str, **arguments: Any) -> list[Any]:
        return self.ranks.call(function, recipe=str(self.recipe), run_dir=str(self.dir), **arguments)

    def manifest(self, stage: str) -> dict[str, Any]:
        found = read_manifest(self.dir / stage)
        assert found is not None
        return found

    def rows(self, stage: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.dir / stage / "metrics.jsonl").read_text().splitlines()]


def cut(folder: Path, name: str) -> list[dict[str, Any]]:
    """A file of the quickstart as two sources: its first 120 rows and the next 40."""
    lines = (tiny.QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    sources = []
    for part, some in zip(NAMES, (lines[:120], lines[120:160]), strict=True):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{part}.jsonl").write_text("".join(some), encoding="utf-8")
        sources.append({"path": str(folder / name / f"{part}.jsonl")})
    return sources


@pytest.fixture(scope="module")
def case(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("sources")
    demonstrations = [{**s, "weight": w} for s, w in zip(cut(folder, "demonstrations"), (1, 1), strict=True)]
    evaluate = {
        "kind": "evaluate",
        "model": "ppo",
        "against": "sft",
        "reward": ["reward"],
        "prompts": cut(folder, "prompts"),
        "rows": 8,
        "sampling": {"max_prompt_length": 32, "max_response_length": 4},
    }
    recipe = tiny.recipe(
        folder / "r.yaml",
        tiny_llama,
        data__holdout=0.3,
        stages__sft__data=demonstrations,
        stages__sft__packing=True,
        stages__sft__max_length=96,
        stages__sft__micro_batch=4,
        stages__sft__eval_every=2,
        stages__reward__data=cut(folder, "preferences"),
        stages__reward__steps=2,
        stages__ppo__prompts=cut(folder, "prompts"),
        stages__ppo__mix={"temperature": 1000.0},
        stages__ppo__samples_per_prompt=2,
        stages__ppo__steps=2,
        stages__ppo__sampling__max_response_length=4,
        stages__evaluate=evaluate,
    )
    found = Case(ranks(2), recipe, folder / "run")
    found.call("tests.support.stages:chain")
    return found


def test_ranks_are_given_the_same_rows(case: Case, tmp_path: Path) -> None:
    ours, theirs = Case(case.ranks, case.recipe, tmp_path / "run").call("tests.distributed.source_cases:encoded_rows")
    assert ours == theirs
    assert ours["train"][0] > 0 < ours["held_out"][0]


def test_sft_says_how_often_each_source_was_drawn(case: Case) -> None:
    data = case.manifest("sft")["data"]
    total = sum(source["used"] for source in data)
    assert [source["drawn"] for source in data] == [math.ceil(total / 2), total // 2]
    assert data[0]["used"] > 2 * data[1]["used"]


def test_packed_sequences_hold_what_was_drawn(case: Case) -> None:
    (file,) = case.dir.glob(".rows/sft.data/*/packed-*.arrow")
    rows = Dataset.from_file(str(file))
    assert sum(len(lengths) for lengths in rows["seq_lengths"]) == sum(s["drawn"] for s in case.manifest("sft")["data"])
    assert max(map(len, rows["input_ids"])) <= 96
    assert len(rows) >= 8 * 1  # a batch
    seen = [row["num_tokens"] for row in case.rows("sft") if "num_tokens" in row and "loss" in row]
    # 4 steps of 8 sequences, of which all but the last are nearly full.
    assert 0.6 * 32 * 96 < seen[-1] <= 32 * 96
    assert seen == sorted(seen)


def test_held_out_loss_of_each_source(case: Case, tiny_llama: Path) -> None:
    """By plain transformers and PEFT from what was published, a row at a time."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), case.dir / "sft" / "output"
    ).eval()
    (folder,) = case.dir.glob(".rows/sft.data/*")
    rows, metrics = Dataset.from_file(str(folder / "held_out.arrow")), case.manifest("sft")["metrics"]
    # At most eval_rows 16, in proportion; the first of each source as they stand.
    sizes = [sum(number == source for number in rows["source"]) for source in (0, 1)]
    assert min(sizes) > 0
    order = sorted(
        range(len(rows)),
        key=lambda n: (
            (sum(rows["source"][i] == rows["source"][n] for i in range(n)) + 0.5) / sizes[rows["source"][n]],
            n,
        ),
    )
    for source, name in enumerate(NAMES):
        loss, tokens = 0.0, 0
        for n in order[:16]:
            row = rows[n]
            if row["source"] != source:
                continue
            with torch.no_grad():
                said = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            for place, label in enumerate(row["labels"][1:]):
                if label != -100:
                    loss, tokens = loss - float(said[place, label]), tokens + 1
        assert metrics[f"held_out/{name}/loss"] == pytest.approx(loss / tokens, rel=1e-4)
        assert metrics[f"held_out/{name}/perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-3)
    seen = [row["step"] for row in case.rows("sft") if f"held_out/{NAMES[0]}/loss" in row]
    assert seen[:2] == [2, 4]


def test_reward_accuracy_of_each_source(case: Case) -> None:
    found = case.manifest("reward")["metrics"]
    pairs = [found[f"held_out/{name}/pairs"] for name in NAMES]
    assert sum(pairs) == found["held_out/pairs"]
    mean = sum(found[f"held_out/{name}/accuracy"] * n for name, n in zip(NAMES, pairs, strict=True)) / sum(pairs)
    assert mean == pytest.approx(found["held_out/accuracy"])


def test_ppo_scores_on_each_source(case: Case) -> None:
    data = case.manifest("ppo")["data"]
    drawn = [source["drawn"] for source in data]
    assert abs(drawn[0] - drawn[1]) <= 1  # at so high a temperature
    row = next(row for row in case.rows("ppo") if "objective/scores" in row)
    scores = [row[f"objective/scores_on/{name}"] for name in NAMES if f"objective/scores_on/{name}" in row]
    if scores:  # four prompts a step: now and then all are of one source
        assert min(scores) <= row["objective/scores"] <= max(scores)


def test_evaluation_scores_on_each_source(case: Case) -> None:
    found = case.manifest("evaluate")["metrics"]
    for side in ("model", "against"):
        scores = [found[f"score/reward/{name}/{side}"] for name in NAMES]
        assert min(scores) <= found[f"score/reward/{side}"] <= max(scores)
