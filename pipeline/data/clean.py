"""Cleaning of one text: broken Unicode, control and zero-width characters, white space. Each function applied twice gives
what it gives once. Torch-free.
"""

from __future__ import annotations

import re
from typing import Literal

import ftfy
from ftfy.fixes import remove_terminal_escapes

Form = Literal["NFC", "NFKC"]


def unicode(text: str, form: Form = "NFC", straight_quotes: bool = False) -> str:
    """Repair text that was decoded wrongly (mojibake: ftfy, Speer 2019), lone surrogates, ligatures and full-width letters, and
    compose it (`form`). HTML entities and control characters are other steps' work; typographic quotes stay unless asked."""
    if text.isascii() and "\r" not in text:
        return text  # nothing that ftfy looks for is in ASCII, and looking takes most of the time
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        remove_control_chars=False,
        uncurl_quotes=straight_quotes,
        normalization=form,
    )
    return ftfy.fix_text(text, config)


# Cc but tab and line feed, among them C1; soft hyphen; Mongolian vowel separator; zero-width space; bidirectional embeddings
# and overrides (Boucher and Anderson 2021, arXiv 2111.00169); word joiner and invisible operators; byte-order mark;
# interlinear annotation. The marks U+200E and U+200F stay: Arabic and Hebrew need them beside punctuation.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u180e\u200b\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0001]"
)
_EMOJI = "\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff"
# Tags spell the flags of England, Scotland and Wales after a black flag; anywhere else they are hidden text.
_HIDDEN_TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0020-\U000e007f]+")
# Scripts whose letters the joiners shape: Arabic, Syriac, N'Ko, all of India and its neighbours, Mongolian.
_JOINING = (
    "\u0600-\u08ff\u0900-\u109f\u1700-\u18af\u1900-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
)
_USELESS_JOINER = re.compile(
    f"(?<![{_JOINING}\u200c\u200d{_EMOJI}\ufe0f\U000e007f])[\u200c\u200d]+"  # after anything else
    f"|(?<=[{_EMOJI}\ufe0f\U000e007f])(?:\u200c[\u200c\u200d]*|\u200d(?![{_EMOJI}])[\u200c\u200d]*)"  # before no emoji
    "|(?<=[\u200c\u200d])[\u200c\u200d]+"  # one of them is enough
)
_NEW_LINE = re.compile("\r\n?|[\u0085\u2028\u2029]")


def control(text: str) -> str:
    """Take out characters that nobody sees: control characters but tab and line feed, terminal colours, zero-width ones.

    A zero-width joiner or non-joiner stays where it shapes what is read: inside emoji, and after a letter of the Arabic and
    Indic scripts. All line ends become line feeds.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _INVISIBLE.sub("", _NEW_LINE.sub("\n", remove_terminal_escapes(text)))
    return _USELESS_JOINER.sub("", _HIDDEN_TAGS.sub("", text))


_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_END = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")
_RUN = re.compile(r"(?<=\S)[ \t]+(?=\S)")


def whitespace(text: str, collapse: bool = False, strip: bool = False) -> str:
    """Plain spaces for all kinds of spaces, no spaces at a line's end, at most one blank line in a row.

    `collapse` makes one space of many within a line (not of its indentation). `strip` takes white space off both ends of a
    text, which is left alone otherwise: a prompt's end and a reply's beginning join there.
    """
    text = _BLANK_LINES.sub("\n\n", _LINE_END.sub("", _SPACE.sub(" ", text.replace("\r\n", "\n"))))
    if collapse:
        text = _RUN.sub(" ", text)
    return text.strip() if strip else text
