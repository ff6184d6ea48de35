"""The texts of a row, whatever its shape: which fields hold them, how they are changed, and what the row says as a whole.

A row says something wanted and, when it is a preference, something unwanted: its `rejected` side, or its reply when its
`label` is false. The two are kept apart, so that a pair and the same pair swapped are never taken for duplicates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

TEXT_FIELDS = (
    "system",
    "instruction",
    "input",
    "context",
    "prompt",
    "question",
    "query",
    "history",
    "messages",
    "conversations",
    "conversation",
    "text",
    "completion",
    "response",
    "output",
    "answer",
    "instances",
    "chosen",
    "rejected",
)
"""Fields that hold text, in the order in which a row is read; all others (ids, labels, margins, addresses) are left alone."""

NO_TEXT = "no field holds text"
"""Why a row has nothing to prepare; its columns may have names that are not in TEXT_FIELDS."""

REPLIES = frozenset({"completion", "response", "output", "answer"})
INSIDE = frozenset({"content", "value", "text", "input", "output"})
"""Keys further in that hold text: of messages (OpenAI's, ShareGPT's), of their parts, and of Self-Instruct's instances."""

_UNSPACED = r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, Lao, Khmer, kana and Chinese characters: scripts without spaces, where every character counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def change(fields: dict[str, Any], edit: Callable[[str], str]) -> dict[str, Any]:
    """`fields` with `edit` applied to every text; the same object when no text changes."""
    new = {name: _changed(value, edit) if name in TEXT_FIELDS else value for name, value in fields.items()}
    return fields if all(new[name] is fields[name] for name in new) else new


def _changed(value: Any, edit: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        text = edit(value)
        return value if text == value else text
    if isinstance(value, list):
        items = [_changed(item, edit) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if isinstance(value, dict):
        members = {key: _changed(inner, edit) if key in INSIDE else inner for key, inner in value.items()}
        return value if all(members[key] is value[key] for key in members) else members
    return value


def sides(fields: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(wanted, unwanted) texts of a row, in the order of TEXT_FIELDS."""
    wanted: list[str] = []
    unwanted: list[str] = []
    labelled_bad = str(fields.get("label")).strip().lower() in ("false", "0")
    for name in TEXT_FIELDS:
        disliked = name == "rejected" or (name in REPLIES and labelled_bad)
        (unwanted if disliked else wanted).extend(leaves(fields.get(name)))
    return wanted, unwanted


def texts(fields: dict[str, Any]) -> list[str]:
    """All texts of a row, in the order of TEXT_FIELDS."""
    return [text for name in TEXT_FIELDS for text in leaves(fields.get(name))]


def leaves(value: Any, everything: bool = False) -> Iterator[str]:
    """The strings inside a field's value: of a message only its text, or, with `everything`, every string there is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, everything)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if everything or key in INSIDE:
                yield from leaves(inner, everything)


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation or differences of width (NFKC); a character each in scripts that write
    no spaces. Duplicates and contamination are looked for among these."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
