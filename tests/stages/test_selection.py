"""The selection stage on warm ranks: a MoDS chain, models set by hand, one rank and two, a stop and a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipeline import handoff
from tests.faults.test_resume import assert_same_files
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN, CHAIN, STOPPED = (f"tests.support.stages:{name}" for name in ("run", "chain", "stopped"))
SAMPLING = {"max_prompt_length": 32, "max_response_length": 8}
DATA = [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl"), "limit": 60}]
SELECTION = {"kind": "selection", "reward": "reward", "data": DATA, "micro_batch": 8, "max_length": 96}
SELECTION |= {"quality": {"keep": 0.5}, "sampling": SAMPLING}


def recipe(folder: Path, base: Path, stages: dict[str, Any], **changes: Any) -> Path:
    value = {
        "name": "mods",
        "base": {"model": str(base), "dtype": "fp32"},
        "adapter": {"method": "lora", "r": 4, "alpha": 8},
        "deepspeed": {"config": "zero2", "num_gpus": 2},
        "data": {"holdout": 0.1},
        "stages": stages,
        **changes,
    }
    path = folder / "mods.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False))
    return path


def published(run: Path, stage: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(manifest, chosen rows, scores) of a verified output."""
    baton = handoff.open_baton(run / stage)
    rows = [row for file in sorted((baton.path / "data").iterdir()) for row in parquet.read_table(file).to_pylist()]
    return baton.manifest, rows, parquet.read_table(baton.path / "scores.parquet").to_pylist()


def test_mods(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """Reward model, seed set, policy on it, necessary rows, policy on both: scores as plain libraries give them, k-center as
    NumPy does it, and what was chosen is what the next stage learns from."""
    sft = {"kind": "sft", "steps": 2, "batch": 4, "micro_batch": 2, "lr": 1e-2}
    comparisons = {"path": str(tiny.QUICKSTART / "preferences.jsonl"), "limit": 32}
    necessity = {"model": "sft_seed", "keep": 0.5}
    stages = {
        "reward": {**sft, "kind": "reward", "data": [comparisons]},
        "seed": {**SELECTION, "budget": 10},
        "sft_seed": {**sft, "data": [{"stage": "seed"}]},
        "select": {**SELECTION, "budget": 16, "necessity": necessity, "include": "seed"},
        "sft": {**sft, "data": [{"stage": "select"}]},
    }
    path, run = recipe(tmp_path, tiny_llama, stages), tmp_path / "run"
    ranks(2).call(CHAIN, recipe=str(path), run_dir=str(run))
    lines = [json.loads(line) for line in (tiny.QUICKSTART / "demonstrations.jsonl").open()]

    manifest, chosen, scores = published(run, "seed")
    assert len(scores) == 60
    assert manifest["data"][0]["used"] == 60
    assert {(row["source"], row["file"]) for row in scores} == {(1, "demonstrations.jsonl")}
    rows = [lines[row["row"] - 1] for row in scores]
    quality, states = alone(tiny_llama, run / "reward" / "output", rows)
    np.testing.assert_allclose([row["quality"] for row in scores], quality, atol=1e-5)
    good = sorted(np.argsort(-np.array([row["quality"] for row in scores]), kind="stable")[:30].tolist())
    assert [n for n, row in enumerate(scores) if row["verdict"] != "quality"] == good
    order = farthest_first(states[good], 10)
    assert [scores[good[place]]["rank"] for place in order] == list(range(1, 11))
    assert chosen == [row for row, score in zip(rows, scores, strict=True) if score["verdict"] == "chosen"]

    manifest, both, again = published(run, "select")
    seed = [n for n, row in enumerate(scores) if row["verdict"] == "chosen"]
    assert [row["quality"] for row in again] == [row["quality"] for row in scores]
    assert [n for n, row in enumerate(again) if row["verdict"] == "chosen by seed"] == seed
    asked = sorted(set(good) - set(seed))
    assert [n for n, row in enumerate(again) if row["answer"] is not None] == asked
    lowest = sorted(asked, key=lambda n: (again[n]["necessity"], n))[:10]
    needed = sorted(lowest)
    assert [n for n, row in enumerate(again) if row["verdict"] == "necessity"] == sorted(set(asked) - set(needed))
    order = farthest_first(states[[*seed, *needed]], 6, given=10)
    assert [again[[*seed, *needed][place]]["rank"] for place in order] == list(range(1, 7))
    taken = sorted([*seed, *([*seed, *needed][place] for place in order)])
    assert both == [rows[n] for n in taken]
    assert manifest["metrics"]["rows/chosen"] == 16
    assert handoff.open_baton(run / "sft").manifest["data"][0]["used"] == 16


def alone(base: Path, reward: Path, rows: list[dict[str, str]]) -> tuple[list[float], np.ndarray]:
    """(score of each row's reply, mean of the base's last hidden states), by transformers and PEFT one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    below = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    below.config.pad_token_id = tokenizer.pad_token_id
    judge = PeftModel.from_pretrained(below, reward).eval()
    body = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model.eval()
    scores, states = [], []
    for row in rows:
        ids = [
            *tokenizer(row["prompt"])["input_ids"],
            *tokenizer(row["completion"])["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            scores.append(float(judge(input_ids=torch.tensor([ids])).logits))
            states.append(body(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy())
    return scores, np.stack(states)


def farthest_first(points: np.ndarray, count: int, given: int = 0) -> list[int]:
    """Places of the centres after the first `given`, in float64."""
    apart = np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)
    order = list(range(given)) or [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    while len(order) < given + count:
        order.append(int(apart[:, order].min(1).argmax()))
    return order[given:]


# ---------------------------------------------------------------- models set by hand

WORDS = ["<pad>", "<eos>", "knows", "not", "good", "bad", "so", "x", "y", "z"]
WIDTH = 16


def by_hand(folder: Path, kind: type[Any], **changes: Any) -> Any:
    """A model of one block that adds nothing to the embeddings; each word is a direction, which the norm makes 4 long."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="so"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    shape = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **shape, **changes
    )
    built = kind(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        built.model.embed_tokens.weight[:, : len(WORDS)] = torch.eye(len(WORDS))
    return built


@pytest.fixture
def speaker(tmp_path: Path) -> Path:
    """Answers `good` to a prompt that ends by `knows`, `bad` to one that ends by `not`, and ends there."""
    built = by_hand(tmp_path / "speaker", LlamaForCausalLM)
    with torch.no_grad():
        for before, after in (("knows", "good"), ("not", "bad"), ("good", "<eos>"), ("bad", "<eos>")):
            built.lm_head.weight[WORDS.index(after), WORDS.index(before)] = 25.0  # a logit of 100
    built.save_pretrained(tmp_path / "speaker")
    return tmp_path / "speaker"


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """Its EOS attends to all words alike; the head likes `good` and dislikes `bad`."""
    built = by_hand(tmp_path / "judge", LlamaForSequenceClassification, num_labels=1)
    with torch.no_grad():
        for layer in (built.model.layers[0].self_attn.v_proj, built.model.layers[0].self_attn.o_proj):
            layer.weight.copy_(torch.eye(WIDTH))
        built.score.weight[0, WORDS.index("good")], built.score.weight[0, WORDS.index("bad")] = 1.0, -1.0
    built.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


ROWS = [
    ("x knows", "so good"),  # answered well by itself
    ("x not", "so good"),
    ("y not", "so bad"),  # a bad reply
    ("y not", "so good"),
    ("x not", "so good so"),
    ("z not", "good good good good good good"),
    ("z knows", "good"),
]


def test_models_set_by_hand(ranks: Get, speaker: Path, judge: Path, tmp_path: Path) -> None:
    """A reward model from outside the chain and the base's own answers. Row 3 is bad, rows 1 and 7 the base answers well: three
    of the other four are chosen by what words they are made of."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    stage = {"kind": "selection", "data": [{"path": "rows.jsonl"}], "budget": 3, "micro_batch": 2}
    stage |= {"reward": {"model": str(judge), "dtype": "fp32"}, "quality": {"threshold": 0.0}}
    stage |= {"necessity": {"model": "base", "threshold": 0.0}, "sampling": {"max_response_length": 4}}
    path = recipe(tmp_path, speaker, {"select": stage}, data={"holdout": 0.0})
    ranks(2).call(RUN, recipe=str(path), stage="select", run_dir=str(tmp_path / "run"))
    manifest, chosen, scores = published(tmp_path / "run", "select")
    assert [row["answer"] for row in scores] == ["good", "bad", None, "bad", "bad", "bad", "good"]
    states = [
        bag("<eos>") / 4 + bag(f"{prompt} {reply} <eos>") for prompt, reply in ROWS
    ]  # what EOS is, and what it reads
    states = [state / np.sqrt(np.mean(state**2)) for state in states]
    quality = [state[WORDS.index("good")] - state[WORDS.index("bad")] for state in states]
    np.testing.assert_allclose([row["quality"] for row in scores], quality, rtol=1e-3)
    points = np.stack([bag(f"{prompt} {reply} <eos>") for prompt, reply in ROWS])
    left = [1, 3, 4, 5]
    order = [left[place] for place in farthest_first(points[left], 3)]
    assert [scores[row]["rank"] for row in order] == [1, 2, 3]
    verdicts = ["necessity", "budget", "quality", "budget", "budget", "budget", "necessity"]
    for row in order:
        verdicts[row] = "chosen"
    assert [row["verdict"] for row in scores] == verdicts
    assert chosen == [{"prompt": ROWS[row][0], "completion": ROWS[row][1]} for row in sorted(order)]
    assert manifest["inputs"]["outside"] == {"reward": handoff.model_hash(str(judge))}


def bag(text: str) -> np.ndarray:
    """The mean of a text's words as the hand-set base sees them: directions of length 4."""
    found = np.zeros(WIDTH)
    for word in text.split():
        found[WORDS.index(word)] += 4.0
    return found / len(text.split())


# ---------------------------------------------------------------- ranks and resume


@pytest.fixture
def alone_recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    """A selection that needs no other stage: the base answers, a random classifier scores."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "judge")
    stage = {**SELECTION, "reward": {"model": str(tmp_path / "judge"), "dtype": "fp32"}, "save_every": 1, "budget": 8}
    return recipe(tmp_path, tiny_llama, {"select": {**stage, "necessity": {"model": "base", "keep": 0.5}}})


def test_one_rank_and_two_stopped_and_killed(ranks: Get, alone_recipe: Path, tmp_path: Path) -> None:
    """The same content on one rank and on two; stopped after its first batches, and killed with a part half written and a
    part spoilt, it goes on to the same bytes."""
    arguments = {"recipe": str(alone_recipe), "stage": "select"}
    two, cut = tmp_path / "two", tmp_path / "cut"
    hashes = ranks(2).call(RUN, **arguments, run_dir=str(two))
    assert ranks(1).call(RUN, **arguments, run_dir=str(tmp_path / "one")) == hashes[:1]

    (cut / "select").mkdir(parents=True)
    (cut / "select" / "STOP").touch()
    assert ranks(2).call(STOPPED, **arguments, run_dir=str(cut)) == [True, True]
    (cut / "select" / "STOP").unlink()
    saved = cut / "select" / "checkpoints"
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["quality-2"]
    first = (saved / "quality-2" / "values.npy").stat().st_mtime_ns
    ranks(2).call(RUN, **arguments, run_dir=str(cut))
    assert_same_files(cut, two, "select")
    assert (saved / "quality-2" / "values.npy").stat().st_mtime_ns == first

    shutil.rmtree(cut / "select" / "output")
    shutil.rmtree(saved / "coverage-2")
    (saved / "coverage-2.writing").mkdir()
    spoilt = saved / "necessity-4" / "texts.json"
    spoilt.write_text(spoilt.read_text().replace("a", "b"))
    ranks(2).call(RUN, **arguments, run_dir=str(cut))
    assert_same_files(cut, two, "select")
    assert (saved / "quality-2" / "values.npy").stat().st_mtime_ns == first
