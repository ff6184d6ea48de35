"""What a policy can do, against plain Hugging Face forwards, lm_eval's own models and NumPy; and the stage around it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.evaluate.kept import SCORES
from tests.stages.test_merge import SFT
from tests.stages.test_pretrain import DOMAIN, recipe
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"
BASE = tiny.QUICKSTART / "base"
GENERAL = [{"path": str(DOMAIN / "stories.jsonl")}]
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "colours.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "The {{thing}} is",
    "doc_to_choice": ["red", "green", "blue"],
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def forgetting(data: Path, **changes: Any) -> dict[str, Any]:
    """An evaluate stage with every suite, small."""
    suites = {
        "of": ["base", "sft"],
        "perplexity": {"data": GENERAL, "rows": 12, "max_length": 16},
        "continuation": {"data": GENERAL, "rows": 12, "context": 6, "length": 4},
        "translation": {"path": "pairs.tsv", "rows": 4, "shots": 1, "max_response_length": 8},
        "code": {"path": str(data / "human-eval" / "HumanEval.jsonl.gz"), "rows": 2, "max_response_length": 4},
        "truthfulqa": {"path": "truth.csv"},
        "gsm8k": {"path": "sums.jsonl", "train": "shots.jsonl", "shots": 1, "max_response_length": 8},
        "tasks": [{"path": "colours.yaml"}],
    }
    return {"kind": "evaluate", "micro_batch": 4, "forgetting": {**suites, **changes}}


def files(folder: Path) -> None:
    """The suites' files, by hand, beside the recipe."""
    pairs = [("Hello.", "你好"), ("Run!", "跑"), ("Thanks.", "谢谢"), ("Yes.", "是"), ("No.", "不"), ("Good.", "好")]
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    with (folder / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        rows.writerow(["What is red?", "A rose", "A rose; Blood", "The sky; The sea; Grass"])
        rows.writerow(["Who barks?", "A dog", "A dog", "A cat"])
    sums = [{"question": f"{n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 5)]
    for name, part in (("sums", sums[:3]), ("shots", sums[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    colours = [{"thing": thing, "label": n % 3} for n, thing in enumerate(("rose", "tree", "sea", "sky"))]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in colours))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}}}
    (folder / "colours.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def run(ranks: Get, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting")
    files(folder)
    recipe(folder, BASE, {"sft": {**SFT, "steps": 1}, "test": forgetting(test_data)})
    for stage in ("sft", "test"):
        ranks(2).call(RUN, recipe=str(folder / "domain.yaml"), stage=stage, run_dir=str(folder / "run"))
    return folder / "run"


def results(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "test" / "output" / "results.json").read_text()))


def table(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "test" / "output" / "forgetting.jsonl").read_text().splitlines()]


def texts() -> list[str]:
    return [json.loads(line)["text"] for line in (DOMAIN / "stories.jsonl").read_text().splitlines()]


def plain(model: Any, ids: list[int]) -> np.ndarray:
    """Log-probability of each token but the first, float64, by a forward of one row."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return np.array([logits[place, token] for place, token in enumerate(ids[1:])])


def documents(tok: Any) -> list[list[int]]:
    """Texts as they are trained on: opening tokens, text, EOS."""
    opening = [] if tok.bos_token_id is None else [tok.bos_token_id]
    return [opening + tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id] for text in texts()]


def test_perplexity(run: Path) -> None:
    """Of pieces of 16 tokens, each beginning with the last token of the one before, the first 12."""
    model, tok = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    pieces = [ids[at : at + 16] for ids in documents(tok) for at in range(0, len(ids) - 1, 15)][:12]
    losses = [-plain(model, piece) for piece in pieces]
    loss = np.concatenate(losses).mean()
    assert results(run)["perplexity/loss/base"] == pytest.approx(loss, abs=1e-5)
    assert results(run)["perplexity/perplexity/base"] == pytest.approx(np.exp(loss), rel=1e-5)


def test_continuation(run: Path) -> None:
    """A text's own four tokens after six, among those of the three texts that follow."""
    model, tok = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    chosen = [ids for ids in documents(tok) if len(ids) >= 10][:12]
    right = 0
    for place, ids in enumerate(chosen):
        ends = [chosen[(place + step) % 12][6:10] for step in range(4)]
        said = [plain(model, ids[:6] + end)[-4:].sum() for end in ends]
        right += said[0] > max(said[1:])
    assert results(run)["continuation/accuracy/base"] == pytest.approx(right / 12)


def test_multiple_choices_are_those_of_lm_eval_s_own_model(run: Path) -> None:
    """MC1, MC2 and a task file through lm_eval's HFLM."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    from stages.evaluate import harness

    with (run.parent / "truth.csv").open() as file:
        local = {"validation": [harness.question(row) for row in csv.DictReader(file)]}
    tasks = [harness.own_task("truthfulqa", f"truthfulqa_{mc}", local) for mc in ("mc1", "mc2")]
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(BASE), batch_size=2)
    given: list[Any] = [*tasks, load_yaml(run.parent / "colours.yaml")]
    found = simple_evaluate(model=lm, tasks=given, bootstrap_iters=0)["results"]
    ours = results(run)
    assert ours["truthfulqa/mc1/base"] == pytest.approx(found["truthfulqa_mc1"]["acc,none"])
    assert ours["truthfulqa/mc2/base"] == pytest.approx(found["truthfulqa_mc2"]["acc,none"], abs=1e-4)
    assert ours["tasks/colours/acc/base"] == pytest.approx(found["colours"]["acc,none"])


def test_questions_of_truthfulqa_s_file() -> None:
    from stages.evaluate.harness import question

    row = {"Question": "Q?", "Best Answer": "a", "Correct Answers": "a; b", "Incorrect Answers": "c; d;"}
    assert question(row) == {
        "question": "Q?",
        "mc1_targets": {"choices": ["a", "c", "d"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["a", "b", "c", "d"], "labels": [1, 1, 0, 0]},
    }


def test_chances(run: Path) -> None:
    """Of choices: MC1 1 of 4 and 1 of 2, MC2 2 of 5 and 1 of 2, colours 1 of 3."""
    from stages.evaluate import harness

    with (run.parent / "truth.csv").open() as file:
        local = {"validation": [harness.question(row) for row in csv.DictReader(file)]}
    expected = {"mc1": [1 / 4, 1 / 2], "mc2": [2 / 5, 1 / 2]}
    for mc, chances in expected.items():
        task = harness.own_task("truthfulqa", f"truthfulqa_{mc}", local)
        samples = [{"doc": doc} for doc in local["validation"]]
        found = harness.guesses(task, samples)
        assert found is not None
        assert [guess["acc"] for guess in found] == pytest.approx(chances)


def test_numbers_of_gsm8k_are_matched_as_its_authors_write_them() -> None:
    from stages.evaluate import harness

    local = {"test": [{"question": "1 and 1?", "answer": "Two.\n#### 1,002"}], "train": []}
    task = harness.own_task("gsm8k", "gsm8k", {**local, "train": local["test"]})
    doc = local["test"][0]
    for reply, right in {" So #### 1002": 1.0, " #### 1,002": 1.0, " it is 1002": 0.0, " #### 1003": 0.0}.items():
        asked = Instance("generate_until", doc, ("", {}), 0, resps=[reply])
        strict = next(found for found in task._filters if found.name == "strict-match")
        strict.apply([asked])
        assert task.process_results(doc, [asked.filtered_resps["strict-match"]])["exact_match"] == right


def test_what_a_tiny_model_cannot_do_it_cannot_lose(run: Path) -> None:
    verdicts = {row["measure"]: row["verdict"] for row in table(run)}
    assert set(verdicts) == {
        "perplexity/loss",
        "continuation/accuracy",
        "translation/bleu",
        "translation/chrf",
        "code/pass@1",
        "truthfulqa/mc1",
        "truthfulqa/mc2",
        "gsm8k/exact_match",
        "tasks/colours/acc",
        "tasks/colours/acc_norm",
    }
    assert {verdicts[name] for name in ("code/pass@1", "gsm8k/exact_match")} == {"not measurable: at chance before"}
    assert verdicts["perplexity/loss"] in ("kept", "lost")


def test_the_table_and_the_metrics_say_the_same(run: Path) -> None:
    found = results(run)
    for row in table(run):
        assert (row["since"], row["policy"]) == ("base", "sft")
        assert row["before"] == found[f"{row['measure']}/base"]
        assert row["after"] == found[f"{row['measure']}/sft"]
        assert row["change"] == pytest.approx(row["after"] - row["before"])
        assert row["low"] <= row["change"] <= row["high"]


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("test"))
    for file in run.parent.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    return folder / "run"


def test_the_same_on_one_rank_and_after_an_interruption(ranks: Get, run: Path, tmp_path: Path) -> None:
    """Half of what was measured is gone, the rest is written half."""
    later = copied(run, tmp_path)
    for number, file in enumerate(sorted((later / SCORES).iterdir())):
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-5])
    ranks(1).call(RUN, recipe=str(tmp_path / "domain.yaml"), stage="test", run_dir=str(later))
    for name in ("results.json", "forgetting.jsonl"):
        assert (later / "test/output" / name).read_bytes() == (run / "test/output" / name).read_bytes()


def test_a_loss_beyond_the_budget_fails_the_run(ranks: Get, run: Path, tmp_path: Path) -> None:
    """Another policy, trained until it has lost much; what was measured is kept, and the base is not measured again."""
    later = copied(run, tmp_path)
    suites = {"of": ["base", "far"], "perplexity": {"data": GENERAL, "rows": 12, "max_length": 16}}
    far = {**SFT, "steps": 20, "lr": 0.05}
    stages = {"far": far, "test": {"kind": "evaluate", "micro_batch": 4, "forgetting": suites}}
    for limit, fails in ((0.1, True), (100.0, False)):
        stages["test"]["forgetting"]["max_loss"] = {"perplexity/loss": limit}
        recipe(tmp_path, BASE, stages)
        if limit < 1:
            ranks(2).call(RUN, recipe=str(tmp_path / "domain.yaml"), stage="far", run_dir=str(later))
        before = {file.name: file.stat().st_mtime_ns for file in (later / SCORES).iterdir()}
        if fails:
            told = ranks(2).call(
                "tests.support.stages:refused",
                recipe=str(tmp_path / "domain.yaml"),
                stage="test",
                run_dir=str(later),
            )
            said = re.compile(r"far lost .* of perplexity/loss .* max_loss allows 0.1")
            assert all(said.search(text) for text in told)
            assert not (later / "test" / "output").exists()
        else:
            ranks(2).call(RUN, recipe=str(tmp_path / "domain.yaml"), stage="test", run_dir=str(later))
            assert (later / "test" / "output").exists()
        after = {file.name: file.stat().st_mtime_ns for file in (later / SCORES).iterdir()}
        assert {name: after[name] for name in before} == before
        assert len(after) - len(before) == (1 if fails else 0)
