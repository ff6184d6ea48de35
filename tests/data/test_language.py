"""Telling languages: clear cases, and texts too short to tell."""

import pytest

from pipeline.data.language import language, languages

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The quick brown fox jumps over the lazy dog.", "en"),
        ("Der schnelle braune Fuchs springt über den faulen Hund.", "de"),
        ("Portez ce vieux whisky au juge blond qui fume.", "fr"),
        ("我们明天一起去公园散步好吗", "zh"),
        ("مرحبا، كيف حالك اليوم يا صديقي العزيز؟", "ar"),
    ],
)
def test_clear_cases(text: str, code: str) -> None:
    found, confidence = language(text)
    assert found == code
    assert confidence > 0.5


@pytest.mark.parametrize("text", ["", "Hello", "2 + 2 = 4", "?!... 1234567890 1234567890"])
def test_too_short_to_tell(text: str) -> None:
    assert language(text) == ("unknown", 0.0)


def test_known_codes() -> None:
    assert {"en", "de", "fr", "zh", "ar", "hi", "ja", "ru"} <= set(languages())
