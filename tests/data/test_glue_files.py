"""Rows of every task from hand-written files in the official formats, and from the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from pipeline.config import glue as tasks
from pipeline.config.recipe import Recipe
from pipeline.config.recipe import load as load_recipe
from pipeline.data import glue
from pipeline.data.glue import Data, Item
from pipeline.errors import UserError

pytestmark = pytest.mark.fast


def recipe(folder: Path, task: str, data: Path | None) -> Recipe:
    stage = {"kind": "classify", "task": task, "lr": 1e-3, "data": None if data is None else str(data)}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "base": {"model": "m"}, "stages": {"glue": stage}}))
    return load_recipe(path)


def read(folder: Path, task: str, files: dict[str, str]) -> Data:
    """The rows of a task whose official files are `files`."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return glue.load(recipe(folder, task, folder), "glue")


def tsv(*rows: list[str]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


QQP = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
MNLI = ["index", "promptID", "pairID", "genre", "s1b", "s2b", "s1p", "s2p", "sentence1", "sentence2"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]

# One line of each task's official file, with its header, and the row it must become.
TSV: dict[str, tuple[list[list[str]], Item]] = {
    "cola": ([["gj04", "0", "*", 'He "said so.']], Item(('He "said so.',), 0)),
    "sst2": ([["sentence", "label"], ["a joy 's ", "1"]], Item(("a joy 's ",), 1)),
    "mrpc": (
        [["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "70", "71", 'He "ran .', "He fled ."]],
        Item(('sentence1: He "ran .', "\nsentence2: He fled ."), 1),
    ),
    "qqp": (
        [QQP, ["1", "2", "3", "Why\u2028?", "How?", "0"]],
        Item(("question1: Why\u2028?", "\nquestion2: How?"), 0),
    ),
    "stsb": (
        [STSB, ["0", "main", "f", "2012", "0001", "n", "n", "A plane.", "A jet.", "3.800"]],
        Item(("sentence1: A plane.", "\nsentence2: A jet."), 3.8),
    ),
    "mnli": (
        [[*MNLI, "label1", "gold_label"], [*"12345678", "It rains.", "It pours.", "neutral", "contradiction"]],
        Item(("premise: It rains.", "\nhypothesis: It pours."), 2),
    ),
    "qnli": (
        [["index", "question", "sentence", "label"], ["0", "Who?", "He.", "entailment"]],
        Item(("question: Who?", "\nsentence: He."), 0),
    ),
    "rte": (
        [["index", "sentence1", "sentence2", "label"], ["0", "A.", "B.", "not_entailment"]],
        Item(("sentence1: A.", "\nsentence2: B."), 1),
    ),
    "wnli": (
        [["index", "sentence1", "sentence2", "label"], ["0", "A.", "B.", "1"]],
        Item(("sentence1: A.", "\nsentence2: B."), 1),
    ),
}

ENTAILMENT = {"premise": "P.", "hypothesis": "H.", "idx": 0}
SPANS = {"span1_index": 0, "span1_text": "Mark Ray", "span2_index": 5, "span2_text": "him"}
JSONL: dict[str, tuple[Any, list[Item]]] = {
    "boolq": (
        {"question": "is it", "passage": "It is.", "idx": 0, "label": True},
        [Item(("passage: It is.", "\nquestion: is it"), 1)],
    ),
    "cb": ({**ENTAILMENT, "label": "neutral"}, [Item(("premise: P.", "\nhypothesis: H."), 2)]),
    "superglue_rte": ({**ENTAILMENT, "label": "not_entailment"}, [Item(("premise: P.", "\nhypothesis: H."), 1)]),
    "copa": (
        {"premise": "It fell.", "choice1": "Wind.", "choice2": "Sun.", "question": "cause", "label": 1, "idx": 0},
        [Item(("premise: It fell.", "\nquestion: cause", "\nchoice1: Wind.", "\nchoice2: Sun."), 1)],
    ),
    "wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "idx": 0, "label": False, "start1": 2},
        [Item(("word: bank", "\nsentence1: A bank.", "\nsentence2: The bank."), 0)],
    ),
    "wsc": (
        {"text": "Mark Ray told Pete about him.", "target": SPANS, "idx": 0, "label": True},
        [Item(("text: * Mark Ray * told Pete about # him. #", "\nspan1: Mark Ray", "\nspan2: him"), 1)],
    ),
    "multirc": (
        {
            "idx": 7,
            "passage": {
                "text": "Tom ate.",
                "questions": [
                    {"idx": 3, "question": "Who?", "answers": [{"idx": 0, "text": "Tom", "label": 1}]},
                    {"idx": 4, "question": "Did?", "answers": [{"idx": 1, "text": "No", "label": 0}]},
                ],
            },
        },
        [
            Item(("paragraph: Tom ate.", "\nquestion: Who?", "\nanswer: Tom"), 1, (7, 3)),
            Item(("paragraph: Tom ate.", "\nquestion: Did?", "\nanswer: No"), 0, (7, 4)),
        ],
    ),
    "record": (
        {
            "idx": 5,
            "passage": {
                "text": "Ann met Bo. Ann left.",
                "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 9}, {"start": 12, "end": 14}],
            },
            "qas": [{"idx": 9, "query": "@placeholder left", "answers": [{"start": 12, "end": 14, "text": "Ann"}]}],
        },
        [
            Item(("passage: Ann met Bo. Ann left.", "\nquery: Ann left"), 1, (5, 9), "Ann", ("Ann",)),
            Item(("passage: Ann met Bo. Ann left.", "\nquery: Bo left"), 0, (5, 9), "Bo", ("Ann",)),
        ],
    ),
}


@pytest.mark.parametrize("task", TSV)
def test_glue_files(tmp_path: Path, task: str) -> None:
    rows, expected = TSV[task]
    data = read(tmp_path, task, {part.file: tsv(*rows) for part in tasks.TASKS[task].parts})
    assert data.train == [expected]
    names = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    assert data.validation == {name: [expected] for name in names}


@pytest.mark.parametrize("task", JSONL)
def test_super_glue_files(tmp_path: Path, task: str) -> None:
    row, expected = JSONL[task]
    data = read(tmp_path, task, {part.file: jsonl(row) for part in tasks.TASKS[task].parts})
    assert data.train == data.validation["validation"] == expected


def test_diagnostic_sets_are_trained_on_rte(tmp_path: Path) -> None:
    rte = jsonl({**ENTAILMENT, "label": "entailment"})
    broad = jsonl({"sentence1": "A.", "sentence2": "B.", "idx": 0, "label": "not_entailment", "logic": "Negation"})
    data = read(tmp_path, "axb", {"RTE/train.jsonl": rte, "AX-b/AX-b.jsonl": broad})
    assert data.train == [Item(("premise: P.", "\nhypothesis: H."), 0)]
    assert data.validation == {"validation": [Item(("premise: A.", "\nhypothesis: B."), 1)]}
    gender = jsonl({**ENTAILMENT, "label": "not_entailment", "pair_id": "551"})
    assert read(tmp_path, "axg", {"AX-g/AX-g.jsonl": gender}).validation["validation"][0].label == 1


def test_every_task_is_read_above() -> None:
    assert TSV.keys() | JSONL.keys() | {"axb", "axg"} == tasks.TASKS.keys()


def test_the_task_folder_itself_serves_too_and_is_what_the_manifest_names(tmp_path: Path) -> None:
    text = tsv(["sentence", "label"], ["fine", "1"], ["dull", "0"])
    data = read(tmp_path, "sst2", {"train.tsv": text, "dev.tsv": text})
    assert [item.label for item in data.train] == [1, 0]
    prints = glue.fingerprints(recipe(tmp_path, "sst2", tmp_path), "glue")
    assert [p["path"] for p in prints] == [f"{tmp_path}/train.tsv", f"{tmp_path}/dev.tsv"]
    assert {name: dict(counts) for name, counts in data.counts.items()} == {p["path"]: {"rows": 2} for p in prints}
    (tmp_path / "dev.tsv").write_text(tsv(["sentence", "label"], ["fine", "1"]))
    assert glue.fingerprints(recipe(tmp_path, "sst2", tmp_path), "glue")[1]["sha256"] != prints[1]["sha256"]


def test_broken_lines_of_qqp_are_counted_and_those_of_others_refused(tmp_path: Path) -> None:
    text = tsv(QQP, ["1", "2", "3", "Why?", "How?", "0"], ["broken", "line"])
    data = read(tmp_path, "qqp", {"train.tsv": text, "dev.tsv": text})
    assert data.counts[f"{tmp_path}/train.tsv"] == {"rows": 1, "broken lines": 1}
    text = tsv(["sentence", "label"], ["fine", "1"], ["a\ttab", "0"])
    with pytest.raises(UserError, match=r"train.tsv, row 3: 3 cells"):
        read(tmp_path, "sst2", {"train.tsv": text, "dev.tsv": text})


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", tsv(["sentence", "label"], ["fine", "2"]), r"row 2: label '2'\n  expected one of: negative, positive"),
        ("sst2", tsv(["sentence", "label"], ["fine", "-1"]), "a split whose labels are public"),
        ("sst2", tsv(["index", "sentence"], ["0", "fine"]), "no column label; found: index, sentence"),
        ("sst2", tsv(["sentence", "label"]), "holds no row"),
        ("stsb", tsv(STSB, [*"0123456", "A.", "B.", "high"]), "label 'high'\n  expected a number"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(tmp_path: Path, task: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, task, {"train.tsv": text, "dev.tsv": text})


def test_wrong_json_lines_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1: not as the official file has it: KeyError"):
        read(tmp_path, "multirc", {"train.jsonl": jsonl({"idx": 0}), "val.jsonl": ""})
    late = {"text": "Too short.", "target": {**SPANS, "span2_index": 9}, "idx": 0, "label": True}
    with pytest.raises(UserError, match="a span begins after the text's last word"):
        read(tmp_path, "wsc", {"train.jsonl": jsonl(late), "val.jsonl": ""})


def test_rows_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder laid out as the hub's repository, which `load_dataset` reads in the same way."""
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = Dataset.from_dict({"sentence": ["fine", "dull"], "label": [1, 0]}, features=features)
    (tmp_path / "hub" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / "hub" / "sst2" / f"{split}-00000-of-00001.parquet")
    files = [{"split": s, "path": f"sst2/{s}-*"} for s in ("train", "validation")]
    card = yaml.safe_dump({"configs": [{"config_name": "sst2", "data_files": files}]})
    (tmp_path / "hub" / "README.md").write_text(f"---\n{card}---\n")
    monkeypatch.setitem(tasks.HUB, "glue", str(tmp_path / "hub"))
    found = recipe(tmp_path, "sst2", None)
    data = glue.load(found, "glue")
    assert data.train == data.validation["validation"] == [Item(("fine",), 1), Item(("dull",), 0)]
    assert [p["path"] for p in glue.fingerprints(found, "glue")] == list(data.counts)
    monkeypatch.setitem(tasks.HUB, "glue", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"the hub did not give .*nothing, sst2, train"):
        glue.load(found, "glue")
