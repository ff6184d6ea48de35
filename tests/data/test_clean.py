"""Cleaning of one text: expected values from ftfy's documentation, the Unicode standard, and by hand."""

# ruff: noqa: RUF001
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import clean, markup
from pipeline.data.mask import mask

pytestmark = pytest.mark.fast

ODD = st.text(
    st.one_of(
        st.sampled_from(
            "ab \t\n\r<>&;#\u200b\u200c\u200d\ufe0f\U0001f469\U0001f4bb\u0915\u0645\u00a0\u2028é\u00c3©\x00\x1b[m"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        # ftfy's own examples (ftfy.readthedocs.io), typographic quotes kept
        ("âœ” No problems", "✔ No problems"),
        ("à perturber la réflexion", "à perturber la réflexion"),
        ("l’humanitÃ©", "l’humanité"),
        ("ＬＯＵＤ　ＮＯＩＳＥＳ", "LOUD NOISES"),
        ("ﬂuﬃest", "fluffiest"),
        ("\ud83d\udca9", "\U0001f4a9"),
        ("\ud83d", "\ufffd"),
        ("e\u0301", "é"),  # composed
        ("P&EACUTE;REZ &amp; Co", "P&EACUTE;REZ &amp; Co"),  # entities are another step's
    ],
)
def test_broken_unicode_is_mended(broken: str, mended: str) -> None:
    assert clean.unicode(broken) == mended


def test_quotes_and_compatibility_characters_change_only_when_asked() -> None:
    assert clean.unicode("“x²”") == "“x²”"
    assert clean.unicode("“x²”", straight_quotes=True) == '"x²"'
    assert clean.unicode("“x²”", form="NFKC") == "“x2”"


FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f466"
WRITES = "\u270d\U0001f3fd"
RED_HAIR = "\U0001f468\U0001f3fb\u200d\U0001f9b0"
RAINBOW = "\U0001f3f3\ufe0f\u200d\U0001f308"
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # "I want", with the non-joiner that its spelling asks for
SINHALA = "\u0dc1\u0dca\u200d\u0dbb\u0dd3"  # "Sri", with the joiner of its conjunct
KANNADA = "\u0cb0\u0ccd\u200d\u0c95"


@pytest.mark.parametrize(
    "text", [FAMILY, WRITES, RED_HAIR, RAINBOW, ENGLAND, PERSIAN, SINHALA, KANNADA, "a\tb\nc", "שלום\u200f!"]
)
def test_what_is_seen_stays(text: str) -> None:
    assert clean.control(text) == text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x00b\x07c\x7fd\x9be", "abcde"),
        ("zero\u200bwidth\ufeff \u2060soft\u00adhyphen", "zerowidth softhyphen"),
        ("pass\u200dword\u200c", "password"),  # joiners between Latin letters shape nothing
        ("\U0001f469\u200d", "\U0001f469"),  # nothing follows that it could join
        ("access \u202elevel\u202c = \u2066user\u2069", "access level = user"),  # Boucher and Anderson 2021
        ("hi\U000e0068\U000e0069", "hi"),  # text hidden in tags
        ("\x1b[36;44mcolour\x1b[0m", "colour"),
        ("one\r\ntwo\rthree\u2028four\u0085five", "one\ntwo\nthree\nfour\nfive"),
    ],
)
def test_what_is_not_seen_goes(text: str, seen: str) -> None:
    assert clean.control(text) == seen


def test_white_space_keeps_indentation_and_both_ends() -> None:
    text = "Q:\u00a0what?  \n\n\n\n    if x:\t\n        y  =  1\nA: "
    assert clean.whitespace(text) == "Q: what?\n\n    if x:\n        y  =  1\nA: "
    assert clean.whitespace(text, collapse=True, strip=True) == "Q: what?\n\n    if x:\n        y = 1\nA:"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One</p><p>Two &amp; three</p>", "One\n\nTwo & three"),
        ("<div>a</div><div>b</div>tail", "a\nb\ntail"),
        ("<ul>\n  <li>a</li>\n  <li>b</li>\n</ul>", "- a\n- b"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>", "a\tb\nc\td"),
        ("x<script>alert('<p>')</script>y<br>z<!-- not this -->", "xy\nz"),
        ("<a href='https://a.org/?x=1&y=2' download=''>link</a> text", "link text"),
        (" <b>bold</b> move ", " bold move "),
        ("Tom &amp; Jerry&#39;s caf&eacute;", "Tom & Jerry's café"),
    ],
)
def test_html_becomes_text(page: str, text: str) -> None:
    assert markup.text_of(page) == text


@pytest.mark.parametrize(
    "text",
    [
        "if a<b and c>d then x<y",
        "<think>First, List<int> and Map<String, Long>.</think> I <3 this",
        "https://a.org/?x=1&copy=2 and AT&T",
        "```html\n<p>shown as code</p>\n``` and `<br>`",
        "A template: <title> by <name>",
    ],
)
def test_what_is_not_html_stays(text: str) -> None:
    assert markup.text_of(text) == text


def test_an_entity_that_would_make_html_stays() -> None:
    """Else a second cleaning would take the tag away that a page about HTML talks of."""
    assert markup.text_of("<p>Use <code>&lt;b&gt;</code>, 1 &lt; 2</p>") == "Use &lt;b&gt;, 1 < 2"


@pytest.mark.parametrize(
    "edit",
    [clean.unicode, clean.control, clean.whitespace, lambda t: clean.whitespace(t, True, True), markup.text_of, mask],
)
@settings(max_examples=150, deadline=None)
@given(text=ODD)
def test_cleaning_twice_is_cleaning_once(edit, text: str) -> None:  # type: ignore[no-untyped-def]
    once = edit(text)
    assert edit(once) == once


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "<b>", "&lt;", "&gt;", "&amp;", "<script>", "</script>", "lt;", *"bp></&` \n"]),
        max_size=14,
    )
)
def test_html_twice_is_html_once(pieces: list[str]) -> None:
    once = markup.text_of("".join(pieces))
    assert markup.text_of(once) == once
