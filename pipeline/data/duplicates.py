"""Duplicates: the same text again (a hash), and nearly the same text (MinHash with locality-sensitive hashing). Torch-free.

Rows come in order and the first of each kind stays. Both compare what a row says as a whole (texts.sides); near duplicates
by the Jaccard similarity of their n-grams of words (Broder 1997), estimated from MinHash signatures by the library rensa.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

from rensa import RMinHash, RMinHashDeduplicator

from pipeline.data.texts import sides, words

SEED = 42
"""Fixes the hash functions, so that a row's signature is the same in every process and run."""

RECALL = 0.9
"""The chance with which a pair exactly at the threshold must become a candidate."""


def exact_key(fields: dict[str, Any]) -> bytes:
    """16 bytes that two rows share when they say the same: composed (NFC), white space apart; case and punctuation count."""
    hasher = hashlib.blake2b(digest_size=16)
    for side in sides(fields):
        for text in side:
            plain = " ".join(unicodedata.normalize("NFC", text).split())
            hasher.update(plain.encode("utf-8", "surrogatepass") + b"\x1f")
        hasher.update(b"\x1e")
    return hasher.digest()


def shingles(fields: dict[str, Any], n: int) -> set[str]:
    """The n-grams of words of a row's wanted and, marked as such, unwanted side. A side of fewer than `n` words is one of its
    own; a row without words is its bare text."""
    grams: set[str] = set()
    for mark, side in zip(("", "\x00"), sides(fields), strict=True):
        found = [word for text in side for word in words(text)]
        if found:
            grams |= {mark + " ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}
    return grams or {" ".join(text.strip() for side in sides(fields) for text in side)}


def signature(grams: set[str], num_perm: int) -> RMinHash:
    """The MinHash signature of a set: `num_perm` 32-bit numbers. The share two have in common estimates their Jaccard
    similarity J with variance at most J (1 - J) / num_perm."""
    return RMinHash.from_token_sets([list(grams)], num_perm, SEED)[0]


def bands(threshold: float, num_perm: int) -> int:
    """Into how many bands a signature is cut: the fewest that make a pair at the threshold a candidate with probability
    RECALL. With b bands of r numbers that is 1 - (1 - threshold^r)^b (Leskovec, Rajaraman and Ullman 2014, section 3.4)."""
    fitting = [b for b in range(1, num_perm + 1) if num_perm % b == 0]
    return next((b for b in fitting if 1.0 - (1.0 - threshold ** (num_perm // b)) ** b >= RECALL), num_perm)


class Exact:
    """The rows seen, by their exact key; about 150 bytes each."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def first(self, key: bytes, where: str) -> str | None:
        """Where the earlier row with this key is; None, and the row is remembered, when it is the first."""
        found = self._seen.setdefault(key, where)
        return None if found is where else found


class Near:
    """The rows kept, by signature. A candidate of the same band counts as a duplicate only if the estimate over the whole
    signature reaches the threshold. About 2.3 KB for each row kept, with 128 numbers in 16 bands."""

    def __init__(self, threshold: float, num_perm: int) -> None:
        self._index = RMinHashDeduplicator(threshold, num_perm, True, bands(threshold, num_perm), SEED)
        self._count = 0

    def first(self, key: RMinHash, where: str) -> str | None:
        """Where the earliest kept row like this one is; None, and the row is remembered, when there is none."""
        self._count += 1
        if self._index.add(f"{self._count}\t{where}", key):
            return None
        found = (name.partition("\t") for name in self._index.get_duplicates(key))
        return min((int(count), place) for count, _, place in found)[1]
