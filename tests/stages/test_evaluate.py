"""The evaluate stage on ranks: what it tests, the same numbers on any number of ranks, nothing measured twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stages.evaluate.kept import SCORES
from tests.stages.test_merge import SFT
from tests.stages.test_pretrain import recipe
from tests.support import tiny
from tests.support.endpoint import reply, serving
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"
COMPARE = {
    "kind": "evaluate",
    "model": "sft",
    "against": "base",
    "prompts": [{"path": str(tiny.QUICKSTART / "prompts.jsonl"), "limit": 400}],
    "rows": 20,
    "micro_batch": 2,
    "sampling": {"max_prompt_length": 32, "max_response_length": 8},
}


@pytest.fixture(scope="module")
def run(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the stage `sft` and its comparison with the base, and two that name the same adapter and base by folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    by_folder = {
        "model": {"model": str(folder / "run" / "sft" / "output")},
        "against": {"model": str(tiny_llama)},
    }
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    model.save_pretrained(folder / "scorer")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "scorer")
    scorer = {"model": str(folder / "scorer"), "dtype": "fp32"}
    stages = {"sft": SFT, "compare": COMPARE, "outside": {**COMPARE, **by_folder, "reward": [scorer]}}
    recipe(folder, tiny_llama, stages)
    for stage in stages:
        evaluate(ranks, folder / "run", stage)
    return folder / "run"


def evaluate(ranks: Get, run: Path, stage: str = "compare", world: int = 2) -> dict[str, bytes]:
    """Run a stage; the files it published."""
    ranks(world).call(RUN, recipe=str(run.parent / "domain.yaml"), stage=stage, run_dir=str(run))
    return {p.name: p.read_bytes() for p in (run / stage / "output").iterdir() if p.name != "manifest.json"}


def refused(ranks: Get, run: Path) -> list[str]:
    """What each rank says as the comparison is refused."""
    recipe_file = str(run.parent / "domain.yaml")
    return ranks(2).call("tests.support.stages:refused", recipe=recipe_file, stage="compare", run_dir=str(run))


def scores(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / SCORES).iterdir()}


def again(run: Path, folder: Path) -> Path:
    """The run as it was before its comparison, with what was measured."""
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("compare", "outside"))
    shutil.copy(run.parent / "domain.yaml", folder)
    return folder / "run"


def published(run: Path, stage: str = "compare") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / stage / "output").iterdir() if p.name != "manifest.json"}


def test_a_model_from_outside_is_the_stage_that_made_it(run: Path) -> None:
    ours, theirs = json.loads(published(run, "outside")["results.json"]), json.loads(published(run)["results.json"])
    assert {name: value for name, value in ours.items() if not name.startswith("score/")} == theirs
    manifest = json.loads((run / "outside" / "output" / "manifest.json").read_text())
    assert set(manifest["inputs"]["outside"]) == {"model", "against", "reward.0"}


def test_another_reward_model_judges(run: Path) -> None:
    """As a plain forward of the classifier, which reads prompt, reply and EOS."""
    folder = run.parent / "scorer"
    model, tok = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows, found = replies(run, "outside"), json.loads(published(run, "outside")["results.json"])
    for key, scores in (("after", "scores_after"), ("before", "scores_before")):
        for row in rows[:5]:
            ids = [
                *tok(row["prompt"])["input_ids"],
                *tok(row[key], add_special_tokens=False)["input_ids"],
                tok.eos_token_id,
            ]
            with torch.no_grad():
                assert row[scores]["scorer"] == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-5)
    won = [row["scores_after"]["scorer"] > row["scores_before"]["scorer"] for row in rows]
    assert found["score/scorer/win_rate"] == pytest.approx(sum(won) / len(won))


def test_the_terminal_and_the_tracker_show_it(run: Path) -> None:
    status = [sys.executable, "-m", "pipeline.cli", "status", str(run.parent / "domain.yaml"), "--run-dir", str(run)]
    said = subprocess.run(status, capture_output=True, text=True, check=True, cwd=tiny.ROOT).stdout
    assert "win rate at equal length" in said
    assert "distinct_2, before -> after" in said
    tracked = [json.loads(line) for line in (run / "compare" / "samples.jsonl").read_text().splitlines()]
    assert [row["after"] for row in tracked] == [row["after"] for row in replies(run)]


def test_the_same_numbers_on_one_rank(ranks: Get, run: Path, tmp_path: Path) -> None:
    alone = again(run, tmp_path)
    shutil.rmtree(alone / SCORES)
    assert evaluate(ranks, alone, world=1) == published(run)


def test_what_was_measured_is_not_measured_again(ranks: Get, run: Path, tmp_path: Path) -> None:
    """A reply that is changed in the file comes out changed: no model was asked for it."""
    later = again(run, tmp_path)
    for file in (later / SCORES).iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for records in (batch for line in lines for batch in line):
            records[0]["reply"] = "kept"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [json.loads(line) for line in evaluate(ranks, later)["samples.jsonl"].splitlines()]
    assert sum(row["after"] == "kept" for row in rows) == 10


def test_an_interrupted_stage_goes_on(ranks: Get, run: Path, tmp_path: Path) -> None:
    """A file whose last line was not written whole: the rest is measured, to the same bytes."""
    later = again(run, tmp_path)
    for file in (later / SCORES).iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    assert evaluate(ranks, later) == published(run)
    assert (
        sum(scores(later)[name] == whole for name, whole in scores(run).items()) == 2
    )  # those of the other stage are not


def replies(run: Path, stage: str = "compare") -> list[dict[str, Any]]:
    return [json.loads(line) for line in published(run, stage)["samples.jsonl"].splitlines()]


def test_what_the_texts_look_like(run: Path) -> None:
    """Lengths and ends as published; the rates that texts alone decide."""
    found, rows = json.loads(published(run)["results.json"]), replies(run)
    for side, key in (("model", "after"), ("against", "before")):
        assert found[f"empty/{side}"] == sum(not row[key].strip() for row in rows) / len(rows)
        assert found[f"refusals/{side}"] == 0.0
        assert 0 < found[f"distinct_1/{side}"] <= found[f"distinct_2/{side}"] <= found[f"distinct_3/{side}"] <= 1


def judged(run: Path, folder: Path, url: str, **settings: Any) -> Path:
    """A copy of the run whose comparison asks a chat judge."""
    later = again(run, folder)
    base = json.loads((run / "sft/output/adapter_config.json").read_text())["base_model_name_or_path"]
    judge = {"chat": url, "model": "longest", "backoff": 0.01, "retries": 1, **settings}
    recipe(folder, base, {"sft": SFT, "compare": {**COMPARE, "chat_judge": judge}})
    return later


def longest(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """Prefers the longer reply."""
    question = asked["messages"][0]["content"]
    a, b = (question.split(f"<answer_{side}>\n")[1].split(f"\n</answer_{side}>")[0] for side in "ab")
    verdict = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    body = json.dumps({"choices": [{"message": {"content": f"[[{verdict}]]"}}]}).encode()
    reply(request, body)


def test_a_chat_judge_is_asked_once(ranks: Get, run: Path, tmp_path: Path) -> None:
    """Twice about each prompt, and never again; its verdicts are those of the lengths in characters."""
    with serving() as server:
        server.script = longest
        later = judged(run, tmp_path, server.url.removesuffix("/score"))
        evaluate(ranks, later)
        rows, found = replies(later), json.loads(published(later)["results.json"])
        assert len(server.requests) == 2 * len(rows)
        won = [0.5 + 0.5 * float(np.sign(len(row["after"]) - len(row["before"]))) for row in rows]
        assert found["chat_judge/win_rate"] == pytest.approx(sum(won) / len(won))
        assert (found["chat_judge/inconsistent"], found["chat_judge/unreadable"]) == (0.0, 0.0)
        first = published(later)
        shutil.rmtree(later / "compare")
        assert evaluate(ranks, later) == first
        assert len(server.requests) == 2 * len(rows)


def test_a_chat_judge_that_fails_loses_nothing(ranks: Get, run: Path, tmp_path: Path) -> None:
    """It fails for good after some prompts; the next run asks about the others."""
    with serving() as server:

        def failing(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
            longest(request, asked) if len(server.requests) <= 32 else reply(request, b"gone", 500)

        server.script = failing
        later = judged(run, tmp_path, server.url.removesuffix("/score"), together=1)
        config = yaml.safe_load((tmp_path / "domain.yaml").read_text())
        config["stages"]["compare"]["micro_batch"] = 1
        (tmp_path / "domain.yaml").write_text(yaml.safe_dump(config))
        assert all("HTTP 500: gone" in told for told in refused(ranks, later))
        assert not (later / "compare" / "output").exists()
        before = len(server.requests)
        server.script = longest
        evaluate(ranks, later)
        assert len(server.requests) - before == 2 * (20 - 16)


def test_another_vocabulary_is_refused(ranks: Get, run: Path, test_data: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = {**COMPARE, "against": {"model": str(test_data / "stories260K")}}
    later = again(run, tmp_path)
    recipe(
        tmp_path,
        json.loads((run / "sft/output/adapter_config.json").read_text())["base_model_name_or_path"],
        {"sft": SFT, "compare": other},
    )
    assert all("another vocabulary" in told for told in refused(ranks, later))
