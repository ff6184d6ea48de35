"""Distinct n-grams, repetition and refusals, by hand."""

from __future__ import annotations

import pytest

from stages.evaluate.texts import distinct, refuses, repetition

pytestmark = pytest.mark.fast


def test_distinct_is_over_all_replies() -> None:
    """a b a | a b: unigrams 2 of 5; bigrams ab ba | ab: 2 of 3; trigrams aba: 1 of 1."""
    replies = [list("aba"), list("ab")]
    assert distinct(replies, 1) == pytest.approx(2 / 5)
    assert distinct(replies, 2) == pytest.approx(2 / 3)
    assert distinct(replies, 3) == 1.0
    assert distinct(replies, 4) == 0.0
    assert distinct([], 1) == 0.0


def test_repetition_counts_four_grams_that_stood_before() -> None:
    """abcdabcd: abcd bcda cdab dabc abcd: one of five again. aaaaaa: three, two of them again."""
    assert repetition("abcdabcd") == pytest.approx(1 / 5)
    assert repetition("aaaaaa") == pytest.approx(2 / 3)
    assert repetition("abcdefg") == 0.0
    assert repetition("abc") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I can not do this.",
        "I cannot assist with that request.",
        "As an AI language model, I do not have opinions.",
        "Well, I won't provide that.",
        "That would violate my guidelines? It violates our policy.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is how.",
        "I can help with that.",
        "He said he was sorry.",
        "x" * 300 + "I cannot help with that.",
        "",
    ],
)
def test_no_refusals(text: str) -> None:
    assert not refuses(text)
