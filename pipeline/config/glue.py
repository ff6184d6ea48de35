"""The tasks of GLUE (Wang et al. 2018, arXiv 1804.07461) and SuperGLUE (Wang et al. 2019, arXiv 1905.00537) as data.

A task says where its splits lie on the hub and in the official download, which columns are read, what the labels are called
and what it is scored by. Column names are the hub's (nyu-mll/glue, aps/super_glue). The official files name them so:

- GLUE, tab-separated without quoting, a header line (`train.tsv`, `dev.tsv`; MNLI `dev_matched.tsv`, `dev_mismatched.tsv`):
    CoLA   no header: source, label, author's mark, sentence
    SST-2  sentence, label
    MRPC   Quality, #1 ID, #2 ID, #1 String, #2 String (a byte-order mark first, in some copies)
    QQP    id, qid1, qid2, question1, question2, is_duplicate (a few lines of train.tsv are broken, and left out by all)
    STS-B  index, genre, filename, year, old_index, source1, source2, sentence1, sentence2, score (0 to 5)
    MNLI   index, promptID, pairID, genre, four parses, sentence1, sentence2, label1 …, gold_label
    QNLI   index, question, sentence, label
    RTE, WNLI  index, sentence1, sentence2, label
- SuperGLUE, JSON lines (`train.jsonl`, `val.jsonl`), fields as on the hub, but for
    MultiRC  {idx, passage: {text, questions: [{idx, question, answers: [{idx, text, label}]}]}}
    ReCoRD   {idx, passage: {text, entities: [{start, end}]}, qas: [{idx, query, answers: [{start, end, text}]}]}, where the
             last letter is at `end`
    WSC      {text, target: {span1_index, span1_text, span2_index, span2_text}, label}

How the tasks that are no plain sentences or pairs become texts to classify:

- wic: the word is a text of its own, before both sentences.
- copa: one text with the premise, `cause` or `effect`, and both choices; the label is the choice (as T5 does).
- wsc: the noun phrase is marked by `*` and the pronoun by `#` in the text (as T5 does), and both follow as texts.
- multirc: one row for each answer, true or false, with its paragraph and question; scored per question and over all answers.
- record: one row for each entity of the passage, put in the query's place (as jiant does), true when it is an answer; a
  query's answer is the entity with the largest margin of true over false.
- axb, axg: diagnostic sets without training data, scored by a classifier of SuperGLUE's RTE, which is trained for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

HUB = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
TRUTH = ("False", "True")
ENTAILS = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Part:
    """A split: its configuration and split on the hub, its file below the folder of the official download."""

    name: str
    config: str
    split: str
    file: str


@dataclass(frozen=True)
class Task:
    """`texts` are the columns read, in order; no `labels` means a number. `metrics` have the names that `evaluate` gives them.

    `local` renames columns of the official files, `header` names those of a file without a header line, and `ragged` is for
    files that hold broken lines. `layout` is what a row must go through before its columns are texts.
    """

    suite: Literal["glue", "super_glue"]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Part
    validation: tuple[Part, ...]
    local: dict[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    ragged: bool = False
    layout: Literal["row", "wsc", "multirc", "record"] = "row"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.train, *self.validation)


def _glue(
    folder: str,
    config: str,
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    *,
    local: dict[str, str] | None = None,
    header: tuple[str, ...] = (),
    ragged: bool = False,
) -> Task:
    train = Part("train", config, "train", f"{folder}/train.tsv")
    validation: tuple[Part, ...] = (Part("validation", config, "validation", f"{folder}/dev.tsv"),)
    if config == "mnli":
        names = ("matched", "mismatched")
        validation = tuple(Part(f"validation_{n}", config, f"validation_{n}", f"{folder}/dev_{n}.tsv") for n in names)
    return Task("glue", texts, labels, metrics, train, validation, local or {}, header, ragged)


def _super(
    folder: str,
    config: str,
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    layout: Literal["row", "wsc", "multirc", "record"] = "row",
) -> Task:
    train = Part("train", config, "train", f"{folder}/train.jsonl")
    validation = (Part("validation", config, "validation", f"{folder}/val.jsonl"),)
    return Task("super_glue", texts, labels, metrics, train, validation, layout=layout)


def _diagnostic(folder: str, config: str, metrics: tuple[str, ...], local: dict[str, str]) -> Task:
    """RTE's training data, the diagnostic set as validation; `local` renames its columns, on the hub too."""
    train = Part("train", "rte", "train", "RTE/train.jsonl")
    validation = (Part("validation", config, "test", f"{folder}/{folder}.jsonl"),)
    return Task("super_glue", ("premise", "hypothesis"), ENTAILS, metrics, train, validation, local)


PAIR = ("sentence1", "sentence2")
NLI = ("premise", "hypothesis")

TASKS: dict[str, Task] = {
    "cola": _glue(
        "CoLA",
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": _glue("SST-2", "sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": _glue(
        "MRPC",
        "mrpc",
        PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        local={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
    ),
    "qqp": _glue(
        "QQP",
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        local={"is_duplicate": "label"},
        ragged=True,
    ),
    "stsb": _glue("STS-B", "stsb", PAIR, (), ("pearson", "spearmanr"), local={"score": "label"}),
    "mnli": _glue(
        "MNLI",
        "mnli",
        NLI,
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        local={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
    ),
    "qnli": _glue("QNLI", "qnli", ("question", "sentence"), ENTAILS, ("accuracy",)),
    "rte": _glue("RTE", "rte", PAIR, ENTAILS, ("accuracy",)),
    "wnli": _glue("WNLI", "wnli", PAIR, ("not_entailment", "entailment"), ("accuracy",)),
    "boolq": _super("BoolQ", "boolq", ("passage", "question"), TRUTH, ("accuracy",)),
    "cb": _super("CB", "cb", NLI, ("entailment", "contradiction", "neutral"), ("accuracy", "f1_macro")),
    "copa": _super(
        "COPA", "copa", ("premise", "question", "choice1", "choice2"), ("choice1", "choice2"), ("accuracy",)
    ),
    "multirc": _super(
        "MultiRC",
        "multirc",
        ("paragraph", "question", "answer"),
        TRUTH,
        ("exact_match", "f1_m", "f1_a"),
        layout="multirc",
    ),
    "record": _super("ReCoRD", "record", ("passage", "query"), TRUTH, ("exact_match", "f1"), layout="record"),
    "superglue_rte": _super("RTE", "rte", NLI, ENTAILS, ("accuracy",)),
    "wic": _super("WiC", "wic", ("word", "sentence1", "sentence2"), TRUTH, ("accuracy",)),
    "wsc": _super("WSC", "wsc", ("text", "span1_text", "span2_text"), TRUTH, ("accuracy",), layout="wsc"),
    "axb": _diagnostic("AX-b", "axb", ("matthews_correlation",), {"sentence1": "premise", "sentence2": "hypothesis"}),
    "axg": _diagnostic("AX-g", "axg", ("accuracy",), {}),
}

WITHOUT_LABELS = {"ax": "its labels are not public: GLUE's server alone scores it, with a classifier of mnli"}


def task_name(value: str) -> str:
    """`value`, if there is such a task. Raises ValueError with all of them otherwise."""
    if value in WITHOUT_LABELS:
        raise ValueError(f"a task that can be scored here; {WITHOUT_LABELS[value]}")
    if value not in TASKS:
        raise ValueError("one of: " + ", ".join(TASKS))
    return value
