"""Measures, their bootstrap intervals, and what a change means."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu

from stages.evaluate.measure import Measure, at_chance, change, draws, mean
from stages.evaluate.suites import corpus_measures

SAID = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_of_sacrebleu_s_own_example() -> None:
    """Its README: 48.53 and 59.73."""
    bleu, chrf = corpus_measures(SAID, REFERENCES, "13a")
    assert (round(bleu.value, 2), round(chrf.value, 2)) == (48.53, 59.73)


def test_a_sample_of_sentences_is_scored_as_a_corpus_of_them() -> None:
    """A sentence drawn twice stands in the corpus twice."""
    counts = np.array([[2.0, 0.0, 1.0]])
    drawn = [0, 0, 2]
    said, references = [SAID[n] for n in drawn], [[one[n] for n in drawn] for one in REFERENCES]
    bleu, chrf = corpus_measures(SAID, REFERENCES, "13a")
    assert bleu.score(counts @ bleu.rows)[0] == pytest.approx(sacrebleu.corpus_bleu(said, references).score)
    assert chrf.score(counts @ chrf.rows)[0] == pytest.approx(sacrebleu.corpus_chrf(said, references).score)


def test_chinese_is_compared_by_its_characters() -> None:
    said, references = ["我喜欢狗和猫", "你好吗"], [["我喜欢狗和鸟", "你好吗"]]
    bleu, _ = corpus_measures(said, references, "zh")
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(said, references, tokenize="zh").score)
    assert 0 < bleu.value < 100


def test_the_chance_of_a_translation_is_another_sentence_s() -> None:
    bleu, _ = corpus_measures(SAID, REFERENCES, "13a")
    assert bleu.chance is not None
    expected = sacrebleu.corpus_bleu([SAID[1], SAID[2], SAID[0]], REFERENCES).score
    assert bleu.score(bleu.chance.sum(0)) == pytest.approx(expected)


def test_a_difference_has_the_interval_of_its_standard_error() -> None:
    """Paired: rows vary by 10, their differences by 1; mean 0.5, standard error 1 / sqrt(400)."""
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 400)
    noise = generator.normal(0.5, 1.0, 400)
    before, after = mean("m", list(hard), [-99.0] * 400), mean("m", list(hard + noise), [-99.0] * 400)
    found = change(before, after)
    error = noise.std() / np.sqrt(400)
    assert found.value == pytest.approx(noise.mean())
    assert (found.low, found.high) == pytest.approx(
        (noise.mean() - 1.96 * error, noise.mean() + 1.96 * error), abs=0.01
    )
    assert found.verdict == "kept"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0] * 60 + [0.0] * 40, [1.0] * 30 + [0.0] * 70, "lost"),
        ([1.0] * 60 + [0.0] * 40, [1.0] * 59 + [0.0] * 41, "kept"),
        ([1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10, "kept"),
        ([1.0] * 25 + [0.0] * 75, [0.0] * 100, "not measurable: at chance before"),
        ([0.0] * 100, [0.0] * 100, "not measurable: at chance before"),
    ],
)
def test_verdicts_on_choices_of_four(before: list[float], after: list[float], verdict: str) -> None:
    chance = [0.25] * 100
    assert change(mean("m", before, chance), mean("m", after, chance)).verdict == verdict


def test_a_loss_is_worse_when_it_grows() -> None:
    tokens = np.full(50, 10.0)
    better = np.stack([np.linspace(8, 12, 50), tokens], 1)
    worse, guess = better + np.array([5.0, 0.0]), np.stack([np.full(50, 40.0), tokens], 1)
    low = Measure("loss", better, higher_is_better=False, chance=guess)
    high = Measure("loss", worse, higher_is_better=False, chance=guess)
    assert low.value == pytest.approx(1.0)
    assert change(low, high).value == pytest.approx(0.5)
    assert (change(low, high).verdict, change(high, low).verdict) == ("lost", "kept")
    assert at_chance(Measure("loss", guess, higher_is_better=False, chance=guess), draws(50, 0))


def test_draws_are_bootstrap_samples() -> None:
    drawn = draws(20, 3)
    assert (drawn.sum(1) == 20).all()
    assert drawn.mean() == pytest.approx(1.0)
    assert drawn.var() == pytest.approx(1 - 1 / 20, abs=0.02)  # multinomial
