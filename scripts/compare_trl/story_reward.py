"""The rule that both sides train on: how many different cheerful words a reply holds, less the gloomy ones."""

from __future__ import annotations

import re
from typing import Any

CHEERFUL = """beautiful best excited friend friends fun glad good great happy hug hugged kind laugh laughed love loved nice
proud smile smiled special thank wonderful"""
GLOOMY = "afraid alone angry bad cried cry dark hurt lost mad mean sad scared sick sorry upset worried"
MOST = 6
"""Where the score saturates, either way."""


def cheerful(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """One score per response: different cheerful words less different gloomy ones, from -6 to 6. Prompts do not count."""
    return [score(response) for response in responses]


def score(response: str) -> float:
    words = set(re.findall(r"[a-z]+", response.lower()))
    return float(max(-MOST, min(MOST, len(words & set(CHEERFUL.split())) - len(words & set(GLOOMY.split())))))
