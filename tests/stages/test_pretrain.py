"""Pre-training on warm ranks: what is read, perplexity document by document in plain transformers, resume to the byte."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import handoff
from pipeline.config.recipe import load
from pipeline.data.documents import spans
from pipeline.data.read import rows
from pipeline.errors import UserError
from tests.distributed.test_methods import OFTEN, forget_after_the_first_step
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
DOMAIN = tiny.ROOT / "pipeline" / "recipes" / "domain"
HOLDOUT, LONGEST = 0.2, 40
PRETRAIN = {
    "kind": "pretrain",
    "data": [{"path": str(DOMAIN / "tales.jsonl"), "limit": 60}],
    "general": [{"path": str(DOMAIN / "stories.jsonl")}],
    "max_length": LONGEST,
    "batch": 4,
    "micro_batch": 2,
    "lr": 1e-2,
    "log_every": 1,
    **OFTEN,
}
METHODS = {"lora": {"method": "lora", "r": 4, "alpha": 8, "dropout": 0.1}, "full": {"method": "full"}}


def recipe(folder: Path, base: Path, stages: dict[str, Any], **changes: Any) -> Path:
    value = {
        "name": "domain",
        "base": {"model": str(base), "dtype": "fp32"},
        "adapter": METHODS["lora"],
        "deepspeed": {"config": "zero2", "num_gpus": 2},
        "data": {"holdout": HOLDOUT},
        "stages": stages,
        **changes,
    }
    path = folder / "domain.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False))
    return path


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (DOMAIN / f"{name}.jsonl").read_text().splitlines()]


def held_out(found: list[str]) -> list[str]:
    """The texts whose hash lies below the held-out share."""
    places = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 for text in found]
    return [text for text, place in zip(found, places, strict=True) if place < HOLDOUT]


def perplexity(model: Any, tok: Any, documents: list[str]) -> float:
    """One document after the other, each predicted in windows of LONGEST tokens that share one."""
    nats, targets = 0.0, 0
    for text in documents:
        ids = [*tok(text, add_special_tokens=False)["input_ids"], tok.eos_token_id]
        seen = 1
        while seen < len(ids):
            window = ids[seen - 1 : seen - 1 + LONGEST]
            with torch.no_grad():
                said = model(input_ids=torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
            nats -= float(said[torch.arange(len(window) - 1), torch.tensor(window[1:])].sum())
            targets += len(window) - 1
            seen += len(window) - 1
        assert seen == len(ids)
    assert targets == sum(len(tok(t, add_special_tokens=False)["input_ids"]) for t in documents)
    return math.exp(nats / targets)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("length", "expected"),
    [(2, [(0, 2)]), (4, [(0, 4)]), (5, [(0, 4), (3, 5)]), (7, [(0, 4), (3, 7)]), (8, [(0, 4), (3, 7), (6, 8)])],
)
def test_pieces_by_hand(length: int, expected: list[tuple[int, int]]) -> None:
    """Of at most 4 tokens. Every token but the first is a target once: the first of a piece is none."""
    assert list(spans(length, 4)) == expected
    assert [t for start, end in expected for t in range(start + 1, end)] == list(range(1, length))


@pytest.mark.fast
def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Two.\r\nLines.\n", newline="")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    found = list(rows(str(tmp_path)))
    assert [row.fields for row in found[:2]] == [{"text": "One."}, {"text": "Two.\r\nLines.\n"}]
    assert (found[2].reason, found[2].detail) == ("not UTF-8", "byte 3")
    (tmp_path / "rows.jsonl").write_text('{"text": "Three."}\n')
    assert [row.fields["text"] for row in rows(str(tmp_path))] == ["Three."], "beside other data they are notes"
    assert len(list(rows(str(tmp_path / "*.txt")))) == 3


@pytest.mark.fast
def test_general_text_that_a_stage_learns_from_is_refused(tmp_path: Path) -> None:
    learned = {"kind": "sft", "data": PRETRAIN["general"], "lr": 1e-3}
    with pytest.raises(
        UserError, match=r"stages.pretrain.general: .*stories.jsonl, which stage sft reads under `data`"
    ):
        load(recipe(tmp_path, tiny.QUICKSTART / "base", {"pretrain": PRETRAIN, "sft": learned}))
    with pytest.raises(UserError, match="which stage pretrain reads"):
        load(recipe(tmp_path, tiny.QUICKSTART / "base", {"pretrain": {**PRETRAIN, "data": PRETRAIN["general"]}}))


@pytest.mark.parametrize(("method", "zero"), [(method, zero) for method in METHODS for zero in (2, 3)])
def test_perplexity_and_resume(ranks: Get, tiny_llama: Path, tmp_path: Path, method: str, zero: int) -> None:
    """What the stage says of held-out and general texts is what plain transformers says, before and after; gone on with
    after its first step it publishes the same bytes."""
    stages = {"pretrain": {**PRETRAIN, "adapter": METHODS[method], "deepspeed": {"config": f"zero{zero}"}}}
    asked = {"recipe": str(recipe(tmp_path, tiny_llama, stages)), "stage": "pretrain", "run_dir": str(tmp_path / "run")}
    hashes = ranks(2).call("tests.support.stages:run", **asked)
    baton = handoff.open_baton(tmp_path / "run" / "pretrain")
    metrics = baton.manifest["metrics"]

    tok = AutoTokenizer.from_pretrained(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    own, general = held_out(texts("tales")), texts("stories")
    assert metrics["before/held_out/domain/perplexity"] == pytest.approx(perplexity(base, tok, own), rel=1e-4)
    assert metrics["before/held_out/general/perplexity"] == pytest.approx(perplexity(base, tok, general), rel=1e-4)
    after = (
        PeftModel.from_pretrained(base, baton.path)
        if method == "lora"
        else AutoModelForCausalLM.from_pretrained(baton.path, dtype=torch.float32)
    ).eval()
    assert metrics["held_out/domain/perplexity"] == pytest.approx(perplexity(after, tok, own), rel=1e-4)
    assert metrics["held_out/general/perplexity"] == pytest.approx(perplexity(after, tok, general), rel=1e-4)
    assert metrics["held_out/domain/perplexity"] < metrics["before/held_out/domain/perplexity"]

    domain, beside = baton.manifest["data"]
    assert (domain["used"], domain["held out"], beside["held out"]) == (60, len(own), 60)
    assert metrics["sequences"] < metrics["pieces"]
    assert metrics["pieces"] > 60

    said = (baton.path / "manifest.json").read_bytes()
    forget_after_the_first_step(tmp_path / "run" / "pretrain")
    assert ranks(2).call("tests.support.stages:run", **asked) == hashes
    assert (baton.path / "manifest.json").read_bytes() == said


def test_unpacked_where_rows_would_see_each_other(ranks: Get, tmp_path: Path) -> None:
    """OPT's mask knows no positions. Nothing is dropped: the pieces' targets are all tokens."""
    base = tiny.model(tmp_path / "base", "opt")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts("tales")[:30]))
    stages = {"pretrain": {**PRETRAIN, "data": [{"path": str(tmp_path / "rows.jsonl")}], "adapter": METHODS["full"]}}
    path, run = recipe(tmp_path, base, stages), tmp_path / "run"
    ranks(2).call("tests.support.stages:run", recipe=str(path), stage="pretrain", run_dir=str(run))
    baton = handoff.open_baton(run / "pretrain")
    metrics = baton.manifest["metrics"]
    tok = AutoTokenizer.from_pretrained(base)
    trained = [t for t in texts("tales")[:30] if t not in held_out(texts("tales")[:30])]
    lengths = [len(tok(t, add_special_tokens=False)["input_ids"]) + 1 for t in trained]
    assert metrics["pieces"] == sum(math.ceil((n - 1) / (LONGEST - 1)) for n in lengths)
    assert metrics["sequences"] == metrics["pieces"]
    model = AutoModelForCausalLM.from_pretrained(baton.path, dtype=torch.float32).eval()
    assert metrics["held_out/general/perplexity"] == pytest.approx(perplexity(model, tok, texts("stories")), rel=1e-4)
