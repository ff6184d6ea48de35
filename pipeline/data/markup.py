"""HTML to text: parsed by Lexbor (the library selectolax), and only where there is HTML. Torch-free."""

from __future__ import annotations

import html
import re
from functools import lru_cache
from typing import Any

from selectolax.lexbor import LexborHTMLParser


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCKS = _names(
    "address article aside blockquote body center dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 "
    "h5 h6 header hr li main nav ol p pre section summary table tbody tfoot thead tr ul"
)
_PARAGRAPHS = _names("blockquote h1 h2 h3 h4 h5 h6 ol p pre table ul")
_UNSEEN = _names("head iframe noscript object script style svg template textarea title")
"""Elements whose content is not read. Without an end they would swallow all that follows, so one is asked for."""
_INLINE = _names(
    "a abbr b bdi bdo big br button caption cite code col colgroup del dfn em font html i img input ins kbd label mark meta "
    "link q s samp small span strike strong sub sup td th tt u var wbr"
)
_TAGS = "|".join(sorted(_BLOCKS | _UNSEEN | _INLINE, key=len, reverse=True))
_BARE = "async|checked|controls|defer|disabled|hidden|multiple|noshade|nowrap|readonly|required|selected"
# A tag carries nothing or attributes: `a<b and c>d` is a comparison, `<think>` and `List<int>` are no HTML.
_ATTRIBUTE = rf"\s+(?:[\w:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'<>=]+)|(?:{_BARE})(?![\w:=-]))"
_TAG = rf"<(?P<end>/)?(?P<name>{_TAGS})(?:{_ATTRIBUTE})*\s*/?>|<!--.*?-->|<!doctype\b[^>]*>"
_NAMED = r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});"
_MARKUP = re.compile(f"{_TAG}|{_NAMED}", re.IGNORECASE | re.DOTALL)
_MARK = re.compile(f"{_TAG}|{_NAMED}|[<&]", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`)", re.DOTALL)


def text_of(text: str) -> str:
    """`text` without HTML: tags gone, scripts and styles with their content, paragraphs apart, entities as characters.

    Tags that HTML does not have (`<think>`), comparisons, addresses with `&`, and code between back-ticks stay as they are.
    An entity stays too where the character would make HTML of what was not (`&lt;b&gt;`).
    """
    while _has_markup(text):
        parts = _CODE.split(text)
        parts[::2] = [_parsed(part) if _has_markup(part) else part for part in parts[::2]]
        cleaned = "".join(parts)
        if cleaned == text:
            return text
        text = cleaned
    return text


def _has_markup(text: str) -> bool:
    return any(_genuine(match, text) for match in _MARKUP.finditer(text))


def _genuine(match: re.Match[str], text: str) -> bool:
    """Whether a match is HTML: an element that hides its content only where it ends."""
    name = (match["name"] or "").lower()
    return name not in _UNSEEN or bool(match["end"]) or _last_end(text, name) >= match.end()


@lru_cache(maxsize=64)
def _last_end(text: str, name: str) -> int:
    return text.lower().rfind(f"</{name}>")


def _parsed(text: str) -> str:
    def guard(match: re.Match[str]) -> str:
        kept = len(match[0]) > 1 and _genuine(match, text)
        return match[0] if kept else html.escape(match[0], quote=False)

    body = LexborHTMLParser(f"<x-text>{_MARK.sub(guard, text)}</x-text>").body
    lines = _Lines()
    stack = _children(body)
    while stack:
        node, closing = stack.pop()
        tag = node.tag
        if tag == "-text":
            lines.say(_readable(node.text_content or ""))
        elif tag == "br" and not closing:
            lines.parts.append("\n")
        elif tag in ("td", "th") and closing:
            lines.end_cell()
        elif tag in _BLOCKS:
            lines.break_off(2 if tag in _PARAGRAPHS else 1)
            if tag == "li" and not closing:
                lines.say("- ")
        if not closing and tag not in _UNSEEN and not tag.startswith(("-", "_")):
            stack.append((node, True))
            stack += _children(node)
    return "".join(lines.parts)


def _children(node: Any) -> list[tuple[Any, bool]]:
    """A node's children, last first and not yet closing, as the stack wants them."""
    found, child = [], node.first_child if node is not None else None
    while child is not None:
        found.append((child, False))
        child = child.next
    return found[::-1]


def _readable(text: str) -> str:
    """A text node, with what would be HTML if it were read again still escaped."""
    return _MARKUP.sub(lambda m: html.escape(m[0], quote=False) if _genuine(m, text) else m[0], text)


class _Lines:
    """Text put together of pieces. A break is made when text follows it, and counts the line feeds that are there."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._due = 0
        self._cells = False

    def say(self, text: str) -> None:
        if not text.strip():
            if not self._due:
                self.parts.append(text)
            return
        if self._cells:
            self.parts.append("\t")
        elif self._due and self.parts:
            written = self.parts[-1]
            self.parts.append("\n" * (self._due - (len(written) - len(written.rstrip("\n")))))
        self.parts.append(text.lstrip() if self._due or self._cells else text)
        self._due, self._cells = 0, False

    def break_off(self, lines: int) -> None:
        """Let what follows begin after at least `lines` line feeds."""
        self._due, self._cells = max(self._due, lines), False

    def end_cell(self) -> None:
        """Let the next cell of the same row of a table begin after a tab."""
        self._cells = True
