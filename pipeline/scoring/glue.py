"""The official metrics of GLUE and SuperGLUE: the functions of scikit-learn and SciPy that `evaluate`'s `glue` and
`super_glue` scripts call, called here without fetching those scripts from the hub.

The rules beside them are the scripts' own: MultiRC's grouping by question, and ReCoRD's answers, compared as SQuAD's are
(Rajpurkar et al. 2016, arXiv 1606.05250).
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.config.glue import Task
from pipeline.data.glue import Item

PLAIN: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda labels, found: f1_score(labels, found, zero_division=0),
    "f1_macro": lambda labels, found: f1_score(labels, found, average="macro", zero_division=0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda labels, found: pearsonr(found, labels)[0],
    "spearmanr": lambda labels, found: spearmanr(found, labels)[0],
}


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """What a classifier says, from `logits` [rows, classes]: the likeliest class, or the number itself for regression."""
    return logits.argmax(-1) if task.labels else logits[:, 0]


def score(task: Task, items: list[Item], logits: np.ndarray) -> dict[str, float]:
    """All official metrics of a task. `logits` is float [rows, classes], one row for each item in order.

    A correlation with predictions that are all equal is not defined, and is nan as in the official script.
    """
    found = predictions(task, logits)
    if task.layout == "multirc":
        return multirc(items, found)
    if task.layout == "record":
        return record(items, logits[:, 1] - logits[:, 0])
    labels = np.array([item.label for item in items])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return {name: float(PLAIN[name](labels, found)) for name in task.metrics}


def multirc(items: list[Item], found: np.ndarray) -> dict[str, float]:
    """Per question: whether all its answers are told right, and the macro F1 of true and false. Over all answers: F1."""
    questions: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):
        questions.setdefault(item.group, []).append(number)
    labels = np.array([int(item.label) for item in items])
    right = [bool((found[rows] == labels[rows]).all()) for rows in questions.values()]
    each = [PLAIN["f1_macro"](labels[rows], found[rows]) for rows in questions.values()]
    return {
        "exact_match": float(np.mean(right)),
        "f1_m": float(np.mean(each)),
        "f1_a": float(PLAIN["f1"](labels, found)),
    }


def record(items: list[Item], margins: np.ndarray) -> dict[str, float]:
    """Per query: the candidate with the largest margin, against the right answer that it is most like."""
    best: dict[tuple[int, ...], int] = {}
    for number, item in enumerate(items):
        if item.group not in best or margins[number] > margins[best[item.group]]:
            best[item.group] = number
    chosen = [items[number] for number in best.values()]
    exact = [max(normal(item.candidate) == normal(answer) for answer in item.answers) for item in chosen]
    f1 = [max(word_f1(item.candidate, answer) for answer in item.answers) for item in chosen]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(candidate: str, answer: str) -> float:
    """F1 of the words that two texts share."""
    said, right = normal(candidate).split(), normal(answer).split()
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right)) if shared else 0.0
