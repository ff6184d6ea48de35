"""Evaluation texts among the training data: rows that share an n-gram of words with named evaluation files. Torch-free.

Brown et al. 2020 (GPT-3, arXiv 2005.14165, appendix C): 13 words without case and punctuation; shorter evaluation texts
count whole if they have at least 8 words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_64_intdigest

from pipeline.data.texts import leaves, texts, words

LEAST = 8
"""Words of the shortest evaluation text that is looked for: anything shorter is said by chance."""


@dataclass(frozen=True)
class Hit:
    """An n-gram that a row and an evaluation file have in common; `share` of the row's n-grams are in some such file."""

    gram: str
    file: str
    share: float


class Evaluation:
    """The n-grams of evaluation files, as 64-bit hashes: about 100 bytes for each word of the files."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._files: list[str] = []
        self._grams: dict[int, dict[int, int]] = {}  # length in words -> hash of an n-gram -> number of its file

    def add(self, file: str, rows: Iterable[dict[str, Any]]) -> None:
        """Take in every text of the rows of one evaluation file, whatever its field is called."""
        self._files.append(file)
        for fields in rows:
            for text in leaves(fields, everything=True):
                found = words(text)
                length = min(self._ngram, len(found))
                if length >= min(LEAST, self._ngram):
                    known = self._grams.setdefault(length, {})
                    for gram in _grams(found, length):
                        known.setdefault(_hash(gram), len(self._files) - 1)

    def search(self, fields: dict[str, Any]) -> Hit | None:
        """The first n-gram of a row that is in an evaluation file; None when there is none."""
        total = hits = 0
        first: tuple[str, int] | None = None
        for text in texts(fields):
            found = words(text)
            total += max(0, len(found) - self._ngram + 1)
            for length, known in self._grams.items():
                for gram in _grams(found, length):
                    file = known.get(_hash(gram))
                    if file is not None:
                        first = first or (gram, file)
                        hits += 1
        return Hit(first[0], self._files[first[1]], min(1.0, hits / max(1, total))) if first else None


def _grams(found: list[str], n: int) -> Iterator[str]:
    return (" ".join(found[i : i + n]) for i in range(len(found) - n + 1))


def _hash(gram: str) -> int:
    return xxh3_64_intdigest(gram.encode("utf-8", "surrogatepass"))
