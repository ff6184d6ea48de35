"""Which language a text is in, by py3langid: naive Bayes over bytes (Lui and Baldwin 2012), with its model in the package."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

MOST = 500
"""Characters looked at, from the start: more do not change the answer and cost time in proportion."""

LEAST = 20
"""Letters below which the answer is a guess: of "Hello" it is Breton."""

UNKNOWN = "unknown"


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages() -> list[str]:
    """The codes (ISO 639) that can be told."""
    return sorted(_identifier().labels)


def language(text: str) -> tuple[str, float]:
    """(ISO 639 code, confidence from 0 to 1); `unknown` for a text of fewer than LEAST letters."""
    start = text[:MOST]
    # A character of Chinese or Japanese says as much as several letters.
    if sum(3 if ch >= "\u3040" else 1 for ch in start if ch.isalpha()) < LEAST:
        return UNKNOWN, 0.0
    code, confidence = _identifier().classify(start)
    return str(code), float(confidence)
