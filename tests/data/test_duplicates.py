"""Duplicates: what counts as the same, Jaccard similarities known by hand, and MinHash's error as its theory has it."""

# ruff: noqa: RUF001
import numpy as np
import pytest

from pipeline.data.duplicates import Exact, Near, bands, exact_key, shingles, signature
from pipeline.data.texts import change, sides, texts, words

pytestmark = pytest.mark.fast


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words("Don't STOP: it's 2 p.m.!") == ["don", "t", "stop", "it", "s", "2", "p", "m"]
    assert words("Ｆｕｌｌ width") == ["full", "width"]
    assert words("我爱Python编程") == ["我", "爱", "python", "编", "程"]


def test_texts_of_a_row_of_any_shape() -> None:
    row = {
        "id": "leave me",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
        ],
        "chosen": "good",
        "rejected": [{"role": "assistant", "content": "bad"}],
        "margin": 1.5,
        "url": "leave me too",
    }
    assert texts(row) == ["hi", "yo", "good", "bad"]
    assert sides(row) == (["hi", "yo", "good"], ["bad"])
    assert sides({"prompt": "p", "completion": "c", "label": False}) == (["p"], ["c"])
    loud = change(row, str.upper)
    assert loud["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "YO"}]}
    assert (loud["id"], loud["url"], loud["margin"], loud["messages"][0]["role"]) == (
        "leave me",
        "leave me too",
        1.5,
        "user",
    )
    assert row["chosen"] == "good", "the row that was read is not changed"
    assert change(row, lambda text: text) is row


def test_exact_means_white_space_apart() -> None:
    key = exact_key({"prompt": "What  is\nit?", "completion": "A cat."})
    assert exact_key({"completion": "A cat. ", "prompt": "What is it?", "id": 7}) == key
    assert len(key) == 16
    for other in (
        {"prompt": "what is it?", "completion": "A cat."},
        {"prompt": "What is it? A", "completion": "cat."},
        {"prompt": "What is it?", "completion": "A cat.", "label": False},
    ):
        assert exact_key(other) != key
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert exact_key(pair) != exact_key({"prompt": "p", "chosen": "b", "rejected": "a"})


def test_shingles() -> None:
    assert shingles({"prompt": "a b c", "completion": "d"}, 3) == {"a b c", "b c d"}
    assert shingles({"text": "a b"}, 3) == {"a b"}
    assert shingles({"text": "?!"}, 3) == {"?!"}
    swapped = [shingles({"chosen": x, "rejected": y}, 1) for x, y in (("a b", "c d"), ("c d", "a b"))]
    assert not swapped[0] & swapped[1]


def test_signatures_estimate_jaccard_as_theory_says() -> None:
    """Sets with |A and B| / |A or B| = 30/60 and 90/100: unbiased, and no wider than sqrt(J (1 - J) / 128)."""
    for common, own, jaccard in ((30, 15, 0.5), (90, 5, 0.9)):
        estimates = []
        for trial in range(200):
            both = {f"{trial} c {n}" for n in range(common)}
            first, second = ({f"{trial} {side} {n}" for n in range(own)} | both for side in "ab")
            assert len(first & second) / len(first | second) == jaccard
            estimates.append(signature(first, 128).jaccard(signature(second, 128)))
        deviation = np.sqrt(jaccard * (1 - jaccard) / 128)
        assert abs(np.mean(estimates) - jaccard) < 4 * deviation / np.sqrt(200)
        assert np.std(estimates) < 1.15 * deviation


def test_bands_find_a_pair_at_the_threshold() -> None:
    assert bands(0.8, 128) == 16  # 1 - (1 - 0.8^8)^16 = 0.947; with 8 bands 0.203
    assert bands(0.9, 128) == 16  # 1 - (1 - 0.9^16)^8 = 0.806 is too little
    assert bands(1.0, 128) == 1


def numbered(*ranges: range) -> dict[str, str]:
    return {"text": " ".join(f"w{n}" for r in ranges for n in r)}


def test_near_duplicates_are_those_above_the_threshold() -> None:
    """Of 104 words, 100 5-grams. Ten words at the end replaced: 90 common of 110, J = 0.818. 34: 66 of 134, J = 0.493."""
    first = numbered(range(104))
    near, far = numbered(range(94), range(1000, 1010)), numbered(range(70), range(2000, 2034))
    for other, jaccard in ((near, 90 / 110), (far, 66 / 134)):
        a, b = shingles(first, 5), shingles(other, 5)
        assert len(a & b) / len(a | b) == jaccard
    index = Near(0.7, 128)
    assert index.first(signature(shingles(first, 5), 128), "rows, row 1") is None
    assert index.first(signature(shingles(far, 5), 128), "rows, row 2") is None
    assert index.first(signature(shingles(near, 5), 128), "rows, row 3") == "rows, row 1"


def test_a_row_is_compared_with_rows_that_stay() -> None:
    """A chain of small changes is not one duplicate: the third is near the second, which is gone, and far from the first."""
    chain = [numbered(range(start, start + 104)) for start in (0, 10, 40)]
    index = Near(0.7, 128)
    found = [index.first(signature(shingles(row, 5), 128), str(n)) for n, row in enumerate(chain)]
    assert found == [None, "0", None]


def test_exact_tells_the_first() -> None:
    index = Exact()
    assert [index.first(key, where) for key, where in ((b"a", "1"), (b"b", "2"), (b"a", "3"))] == [None, None, "1"]
