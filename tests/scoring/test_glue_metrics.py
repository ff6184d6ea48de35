"""Official metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.config.glue import TASKS
from pipeline.data.glue import Item
from pipeline.scoring.glue import score

pytestmark = pytest.mark.fast


def items(labels: list[float]) -> list[Item]:
    return [Item(("text",), label) for label in labels]


def logits(classes: list[int], width: int = 2) -> np.ndarray:
    """Logits whose largest is at each of `classes`."""
    return np.eye(width)[classes] * 3.0 - 1.0


def test_two_classes() -> None:
    """Labels 1 1 1 0 0 told as 1 1 0 0 1: 2 true and 1 false positive, 1 true and 1 false negative."""
    labels, said = items([1, 1, 1, 0, 0]), logits([1, 1, 0, 0, 1])
    for task in ("sst2", "qnli", "rte", "wnli", "mnli", "boolq", "copa", "wic", "wsc", "superglue_rte", "axg"):
        assert score(TASKS[task], labels, said) == {"accuracy": pytest.approx(3 / 5)}
    for task in ("mrpc", "qqp"):
        assert score(TASKS[task], labels, said) == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(2 / 3)}
    for task in ("cola", "axb"):  # (2 x 1 - 1 x 1) / sqrt(3 x 3 x 2 x 2)
        assert score(TASKS[task], labels, said) == {"matthews_correlation": pytest.approx(1 / 6)}


def test_macro_f1_of_three_classes() -> None:
    """Labels 0 0 1 2 told as 0 1 1 1: F1 of 2/3, 1/2 and 0."""
    found = score(TASKS["cb"], items([0, 0, 1, 2]), logits([0, 1, 1, 1], 3))
    assert found == {"accuracy": pytest.approx(1 / 2), "f1_macro": pytest.approx(7 / 18)}


def test_correlations() -> None:
    """1 2 3 4 told as 2 9 4 6: covariance 3.5, squares 5 and 26.75; ranks 1 4 2 3, squared distances 6."""
    found = score(TASKS["stsb"], items([1, 2, 3, 4]), np.array([[2.0], [9.0], [4.0], [6.0]]))
    expected = {"pearson": 3.5 / math.sqrt(5 * 26.75), "spearmanr": 1 - 6 * 6 / (4 * 15)}
    assert found == pytest.approx(expected)
    same = score(TASKS["stsb"], items([1, 2, 3, 4]), np.ones((4, 1)))
    assert all(math.isnan(value) for value in same.values())


def test_multirc_by_question_and_over_all_answers() -> None:
    """Paragraph 0's question 0 is told right; of paragraph 1's question 0 the false answer is told as true as well."""
    rows = [Item(("text",), label, (0, 0)) for label in (1, 0, 1)] + [
        Item(("text",), label, (1, 0)) for label in (1, 0)
    ]
    found = score(TASKS["multirc"], rows, logits([1, 0, 1, 1, 1]))
    expected = {"exact_match": 1 / 2, "f1_m": (1 + (2 / 3 + 0) / 2) / 2, "f1_a": 2 * 3 / (2 * 3 + 1)}
    assert found == pytest.approx(expected)


def test_record_takes_the_likeliest_entity_of_each_query() -> None:
    """`Barack H. Obama` shares two of its three words with `Barack Obama`; `The White House,` is `white house`."""
    first, second = ("Obama Street", "Barack Obama"), ("white house",)
    rows = [
        Item(("text",), 0, (0, 0), "Barack H. Obama", first),
        Item(("text",), 1, (0, 0), "Barack Obama", first),
        Item(("text",), 0, (0, 1), "Congress", second),
        Item(("text",), 1, (0, 1), "The White House,", second),
    ]
    # Margins 1, 0.5; -3, -2: the largest, whichever logit alone is larger.
    said = np.array([[0.0, 1.0], [4.0, 4.5], [3.0, 0.0], [0.0, -2.0]])
    assert score(TASKS["record"], rows, said) == pytest.approx({"exact_match": 1 / 2, "f1": (0.8 + 1) / 2})
