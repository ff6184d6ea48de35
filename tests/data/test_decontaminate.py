"""Decontamination: planted n-grams of evaluation files, and what is too short to be one."""

import pytest

from pipeline.data.decontaminate import Evaluation

pytestmark = pytest.mark.fast

WORDS = [f"w{n}" for n in range(30)]


def evaluation(*texts: str, ngram: int = 13) -> Evaluation:
    found = Evaluation(ngram)
    found.add("test.jsonl", [{"task_id": 1, "anything": {"inside": [text]}} for text in texts])
    return found


def test_thirteen_words_in_common_are_found() -> None:
    against = evaluation(" ".join(WORDS))
    planted = "before " + ", ".join(WORDS[5:18]).upper() + "! after"
    hit = against.search({"prompt": "hi", "completion": planted})
    assert hit is not None
    assert hit.gram == " ".join(WORDS[5:18])
    assert hit.file == "test.jsonl"
    assert hit.share == pytest.approx(1 / 3)  # 15 words hold 3 13-grams
    assert against.search({"completion": "before " + " ".join(WORDS[5:17]) + " after"}) is None, "twelve"


def test_an_n_gram_does_not_span_two_texts() -> None:
    assert (
        evaluation(" ".join(WORDS)).search({"prompt": " ".join(WORDS[:7]), "completion": " ".join(WORDS[7:14])}) is None
    )


def test_short_evaluation_texts_count_whole() -> None:
    against = evaluation(" ".join(WORDS[:8]), " ".join(WORDS[20:27]))
    assert against.search({"text": "say " + " ".join(WORDS[:8]) + " again"}) is not None
    assert against.search({"text": " ".join(WORDS[:7])}) is None
    assert against.search({"text": " ".join(WORDS[20:27])}) is None, "seven words are said by chance"


def test_other_lengths() -> None:
    assert evaluation("a b c d", ngram=3).search({"text": "x b c d y"}) is not None
    assert evaluation("a b", ngram=3).search({"text": "a b"}) is None
