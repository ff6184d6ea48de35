"""The classify stage on two ranks: what it learns, publishes and says, under every ZeRO stage and after a resume."""

from __future__ import annotations

import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline import handoff
from pipeline.config.recipe import load
from pipeline.data.encode import Classified, shares
from pipeline.data.glue import Item
from pipeline.summary import summary
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"


def recipe(folder: Path, base: Path, data: Path, task: str = "sst2", dtype: str = "fp32", **changes: Any) -> Path:
    """A recipe of one classify stage; `changes` are keys of the stage, or blocks of the recipe."""
    stage = {"kind": "classify", "task": task, "data": str(data), "lr": 1e-3, "batch": 8, "micro_batch": 2}
    stage |= {"steps": 4, "max_length": 48, "log_every": 1, "save_every": 2}
    value: dict[str, Any] = {
        "name": "glue",
        "base": {"model": str(base), "dtype": dtype},
        "adapter": {"method": "lora", "r": 4, "alpha": 8},
        "deepspeed": {"config": "zero2", "num_gpus": 2},
    }
    for key, change in changes.items():
        (value if key in value else stage)[key] = change
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({**value, "stages": {"glue": stage}}))
    return path


def sst2(folder: Path, train: list[tuple[str, int]], dev: list[tuple[str, int]]) -> Path:
    """Official SST-2 files of texts and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reviews(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Film reviews (Pang and Lee 2004) as SST-2's files: 40 to train on, 21 to validate."""
    rows = []
    with zipfile.ZipFile(test_data / "movie-reviews" / "movie_reviews.zip") as reviews:
        names = sorted(name for name in reviews.namelist() if name.endswith(".txt"))
        by_label = [[name for name in names if f"/{side}/" in name] for side in ("neg", "pos")]
        for pair in list(zip(*by_label, strict=True))[:31]:
            rows += [(" ".join(reviews.read(name).decode().split()), label) for label, name in enumerate(pair)]
    return sst2(tmp_path_factory.mktemp("reviews"), rows[:40], rows[40:61])


def published(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(manifest, predictions) of a verified output."""
    baton = handoff.open_baton(run / "glue")
    return baton.manifest, [json.loads(line) for line in (baton.path / "predictions.jsonl").open(encoding="utf-8")]


def texts_of(file: Path) -> list[str]:
    return [line.rpartition("\t")[0] for line in file.read_text(encoding="utf-8").split("\n")[1:] if line]


def alone(model: Any, folder: Path, texts: list[str], max_length: int) -> torch.Tensor:
    """Logits of a model without Relay, one text at a time, cut and closed by EOS as the stage says it does."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    opening = tokenizer("")["input_ids"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: max_length - 1 - len(opening)]
        ids = torch.tensor([[*opening, *ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            found.append(model(input_ids=ids).logits[0])
    return torch.stack(found)


def test_reviews_end_to_end(ranks: Get, test_data: Path, reviews: Path, tmp_path: Path) -> None:
    """LoRA on a real tiny model: plain libraries open what is published and say the same of every validation row, and the
    metrics are those of what it says. Killed after its last but one checkpoint it publishes the same bytes."""
    base, run = test_data / "stories260K", tmp_path / "run"
    path = recipe(tmp_path, base, reviews, keep_checkpoints=2)
    ranks(2).call(RUN, recipe=str(path), stage="glue", run_dir=str(run))
    manifest, rows = published(run)
    output = run / "glue" / "output"

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(output).pad_token_id
    model = PeftModel.from_pretrained(model, output).eval()
    said = alone(model, output, texts_of(reviews / "dev.tsv"), 48)
    assert len(rows) == 21, "every validation row once, though they do not divide over ranks and batches"
    torch.testing.assert_close(torch.tensor([row["logits"] for row in rows]), said, atol=1e-4, rtol=1e-4)
    right = sum(row["label"] == ("positive" if b > a else "negative") for row, (a, b) in zip(rows, said, strict=True))
    labels = [int(row["label"] == "positive") for row in rows]
    loss = sum(math.log1p(math.exp(float(s[1 - label] - s[label]))) for s, label in zip(said, labels, strict=True)) / 21
    expected = {"validation/accuracy": right / 21, "validation/loss": loss, "validation/rows": 21}
    assert manifest["metrics"] == pytest.approx(expected, abs=1e-4)
    assert [row["prediction"] for row in rows] == ["positive" if b > a else "negative" for a, b in said]
    assert [(d["rows"], d["used"], d["cut"]) for d in manifest["data"]] == [(40, 40, 40), (21, 21, 21)]

    kept = {p.name: p.read_bytes() for p in output.iterdir()}
    logged = (run / "glue" / "metrics.jsonl").read_text().split("\n")
    shutil.rmtree(output)
    shutil.rmtree(run / "glue" / "checkpoints" / "checkpoint-4")
    ranks(2).call(RUN, recipe=str(path), stage="glue", run_dir=str(run))
    assert {p.name: p.read_bytes() for p in output.iterdir()} == kept
    again = (run / "glue" / "metrics.jsonl").read_text().split("\n")
    assert again[:2] == logged[:2], "it went on from step 2: the rows before it, with their times, are the first run's"
    assert [json.loads(line)["step"] for line in again if line] == [1, 2, 3, 4, 4]

    shown = io.StringIO()
    summary(load(path), run, ["glue"], Console(file=shown, width=100))
    assert f"validation/accuracy | {right / 21:.4g}" in " ".join(shown.getvalue().replace("│", "|").split())


def test_first_step_is_the_gradient_of_the_batch_mean(ranks: Get, tmp_path: Path) -> None:
    """Two ranks and two micro-batches each: the logged loss and gradient norm are those of all eight rows at once. A
    learning rate of next to nothing keeps the weights, which are published, as they were."""
    base = tiny.model(tmp_path / "base", "llama_small")
    rows = [(f"row {n} " + "very " * n + ("good" if n % 2 else "bad"), n % 2) for n in range(8)]
    data = sst2(tmp_path / "data", rows, rows)
    path = recipe(tmp_path, base, data, steps=1, lr=1e-12, adapter={"method": "full"}, max_grad_norm=1e9, warmup=0)
    ranks(2).call(RUN, recipe=str(path), stage="glue", run_dir=str(tmp_path / "run"))
    output = tmp_path / "run" / "glue" / "output"
    model = AutoModelForSequenceClassification.from_pretrained(output, dtype=torch.float32)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(output)
    losses = []
    for text, label in rows:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        losses.append(torch.nn.functional.cross_entropy(model(input_ids=ids).logits, torch.tensor([label])))
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters() if p.grad is not None))
    logged = json.loads((tmp_path / "run" / "glue" / "metrics.jsonl").read_text().split("\n")[0])
    assert logged["loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_mam_learns_what_it_is_shown_and_its_best_is_published(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [(f"film {n} was {('dull', 'fine')[n % 2]}", n % 2) for n in range(16)]
    data = sst2(tmp_path / "data", rows, rows)
    changes = {"steps": 30, "lr": 1e-2, "save_every": None, "log_every": 10, "micro_batch": 4}
    changes |= {"eval_every": 10, "publish": "best", "adapter": {"method": "mam"}}
    path, run = recipe(tmp_path, tiny_llama, data, **changes), tmp_path / "run"
    ranks(2).call(RUN, recipe=str(path), stage="glue", run_dir=str(run))
    metrics = published(run)[0]["metrics"]
    assert metrics["validation/accuracy"] == 1.0
    logged = [json.loads(line) for line in (run / "glue" / "metrics.jsonl").open()]
    assert metrics["validation/loss"] == pytest.approx(min(row["eval_loss"] for row in logged if "eval_loss" in row))


def test_zero_stages_say_the_same(ranks: Get, tmp_path: Path) -> None:
    """Under ZeRO-3 with recomputed activations, which must gather the adapter's weights once more."""
    base = tiny.model(tmp_path / "base", "llama_small")
    rows = [(f"film {n} was {('dull', 'fine')[n % 2]}", n % 2) for n in range(9)]
    data, said = sst2(tmp_path / "data", rows, rows[:5]), []
    for level in (0, 1, 3):
        deepspeed = {"config": f"zero{level}", "num_gpus": 2}
        changes = {"steps": 2, "save_every": 2, "eval_every": 1, "publish": "last", "deepspeed": deepspeed}
        changes["gradient_checkpointing"] = level == 3
        path = recipe(tmp_path, base, data, **changes)
        run = tmp_path / f"run{level}"
        ranks(2).call(RUN, recipe=str(path), stage="glue", run_dir=str(run))
        manifest, found = published(run)
        assert manifest["zero_stage"] == level
        assert manifest["data"][0]["beyond whole batches"] == 1
        said.append(torch.tensor([row["logits"] for row in found]))
    for other in said[1:]:
        torch.testing.assert_close(other, said[0], atol=1e-5, rtol=1e-4)


def test_regression_in_bf16_under_zero_3(ranks: Get, tmp_path: Path) -> None:
    """stsb: one output, a float for a label, squared error; the correlation is that of what is published."""
    base = tiny.model(tmp_path / "base", "llama_small")
    columns = [f"column {n}" for n in range(7)] + ["sentence1", "sentence2", "score"]
    rows = [[*"0123456", "a cat " * (n % 3), "a dog", f"{n % 6}.250"] for n in range(9)]
    (tmp_path / "STS-B").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "STS-B" / f"{name}.tsv").write_text("\n".join("\t".join(row) for row in [columns, *rows]) + "\n")
    changes = {"deepspeed": {"config": "zero3", "num_gpus": 2}, "steps": 3, "save_every": 3}
    path = recipe(tmp_path, base, tmp_path, "stsb", dtype="bf16", **changes)
    ranks(2).call(RUN, recipe=str(path), stage="glue", run_dir=str(tmp_path / "run"))
    manifest, said = published(tmp_path / "run")
    x, y = [row["prediction"] for row in said], [row["label"] for row in said]
    assert y == [n % 6 + 0.25 for n in range(9)]
    assert x == [row["logits"][0] for row in said]
    mx, my = sum(x) / 9, sum(y) / 9
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    pearson = covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    assert manifest["metrics"]["validation/pearson"] == pytest.approx(pearson)
    squares = sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 9
    assert manifest["metrics"]["validation/loss"] == pytest.approx(squares)
    head = load_file(tmp_path / "run" / "glue" / "output" / "adapter_model.safetensors")
    assert [list(value.shape) for name, value in head.items() if ".score." in name] == [[1, 32]]


def test_starts_from_a_policy_whose_adapter_is_merged(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """cb's three classes on an SFT policy of another rank, and of the same rank, whose adapter goes on."""
    rows = [{"premise": f"{n}.", "hypothesis": "So.", "label": ("entailment", "neutral")[n % 2]} for n in range(8)]
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    value = yaml.safe_load(recipe(tmp_path, tiny_llama, tmp_path, "cb", steps=1, init="sft").read_text())
    sft = {"kind": "sft", "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl")}], "lr": 1e-2}
    sft |= {"steps": 1, "batch": 8, "micro_batch": 2}
    other = {**value["stages"]["glue"], "adapter": {"r": 2}}
    path, run = tmp_path / "r.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**value, "stages": {"sft": sft, **value["stages"], "other": other}}))
    ranks(2).call("tests.support.stages:chain", recipe=str(path), run_dir=str(run))
    for stage, merged in (("glue", False), ("other", True)):
        baton = handoff.open_baton(run / stage)
        assert ("base-of-sft" in baton.base) == merged
        head = load_file(baton.path / "adapter_model.safetensors")
        assert [list(value.shape) for name, value in head.items() if ".score." in name] == [[3, 64]]
        assert set(baton.manifest["metrics"]) == {f"validation/{m}" for m in ("accuracy", "f1_macro", "loss", "rows")}


@pytest.mark.fast
def test_the_longest_texts_are_cut_first() -> None:
    assert shares([10, 3, 5], 12) == [5, 3, 4]
    assert shares([2, 2], 10) == [2, 2]
    assert shares([4, 1], 0) == [0, 0]
    tokenizer = AutoTokenizer.from_pretrained(tiny.QUICKSTART / "base")
    long, short = "a long tale of a cat and a dog and a bird", "\nanswer: yes"
    whole = tokenizer(long)["input_ids"]
    ends = [*tokenizer(short)["input_ids"], tokenizer.eos_token_id]
    rows = Classified(tokenizer, [Item((long, short), 1), Item((short,), 0)], len(ends) + len(whole) - 3, classes=True)
    assert rows.cut == 1
    assert rows[0]["input_ids"] == whole[:-3] + ends
    assert rows[0]["attention_mask"] == [1] * len(rows[0]["input_ids"])
    assert [rows[n]["labels"] for n in range(2)] == [1, 0]
