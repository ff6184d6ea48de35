"""The quickstart's corpus: the rule by hand, the data it ships, and what the data must not give away."""

from pathlib import Path

import pytest

from pipeline.recipes.quickstart import corpus

FOLDER = Path(corpus.__file__).parent
PROMPT = "At noon, Anna walks to the garden. What does she see?\n"


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("Anna sees a gate in the garden.", 0),
        ("Anna sees a golden gate in the garden.", 1),
        ("The garden has a golden gate and an ancient tree. She stops near a bench.", 2),
        ("In the garden, she sees a mossy bench and a golden gate. Behind it is a silver pond.", 3),
        # The cap: a fourth vivid word adds nothing.
        ("The golden garden has an ancient tree and a mossy bench. Behind it is a silver pond.", 3),
        # Repetition: the same word three times is one word.
        ("The golden garden has a golden tree and a golden gate.", 1),
        # A list: of neighbouring vivid words only the first counts.
        ("The garden has a golden silver mossy ancient gate.", 1),
        # Another place, no place, two places.
        ("The harbour has a golden boat and a silver rope.", 0),
        ("Anna sees a golden gate and a silver pond.", 0),
        ("The garden and the harbour and the market have it. There is a golden gate.", 0),
        # No full stop, no verb, no capital, stray characters.
        ("Anna sees a golden gate in the garden", 0),
        ("The garden and a golden gate and a silver pond.", 0),
        ("the garden has a golden gate.", 0),
        ("The garden has a golden gate!!.", 0),
        ("The garden has a golden gate.\nAt noon, Anna walks to the garden.", 0),
        ("", 0),
    ],
)
def test_rule_by_hand(completion: str, score: int) -> None:
    assert corpus.rule_score(PROMPT, completion) == score


def test_rule_counts_words() -> None:
    longest = "The garden has a golden gate" + " and a gate" * 6 + "."
    assert len(longest.split()) == corpus.MAX_WORDS
    assert corpus.rule_score(PROMPT, longest) == 1
    assert corpus.rule_score(PROMPT, longest.replace("golden gate", "golden old gate")) == 0


def test_rule_needs_a_known_place_in_the_prompt() -> None:
    assert corpus.rule_score("What does she see?\n", "The garden has a golden gate.") == 0


def test_judge_scores_pairwise() -> None:
    replies = ["The garden has a golden gate.", "The garden has a gate."]
    assert corpus.judge([PROMPT, PROMPT], replies, [{}, {}]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        corpus.judge([PROMPT], replies, [{}])


def test_generation_is_a_function_of_the_seed() -> None:
    made = (corpus.demonstrations, corpus.preferences, corpus.prompts, corpus.tales, corpus.stories)
    for make in (corpus.pretraining_text, *made):
        assert make(3, 20) == make(3, 20)
        assert make(3, 20) == make(3, 40)[:20]
        assert make(3, 20) != make(4, 20)


def test_shipped_files_are_what_the_module_writes() -> None:
    contents = corpus.files()
    assert sum(len(content) for content in contents.values()) <= 1_000_000
    for name, content in contents.items():
        assert (FOLDER / name).read_bytes() == content.encode(), f"{name}: run python -m {corpus.__name__}"
    for name, content in corpus.texts().items():
        assert (FOLDER.parent / "domain" / name).read_bytes() == content.encode(), (
            f"{name}: run python -m {corpus.__name__}"
        )


def test_prompts_are_distinct() -> None:
    for name in corpus.ROWS:
        rows = getattr(corpus, name)(corpus.SEED, corpus.ROWS[name])
        assert len({row["prompt"] for row in rows}) == len(rows) == corpus.ROWS[name]
        assert all(row["prompt"].endswith("?\n") for row in rows)


def test_demonstrations_leave_room_above() -> None:
    rows = corpus.demonstrations(corpus.SEED, corpus.ROWS["demonstrations"])
    scores = corpus.judge([row["prompt"] for row in rows], [row["completion"] for row in rows], rows)
    assert set(scores) == {0.0, 1.0, 2.0, 3.0}
    assert 0.8 < sum(scores) / len(scores) < 1.5


def test_chosen_always_scores_higher_and_length_does_not_tell() -> None:
    rows = corpus.preferences(corpus.SEED, corpus.ROWS["preferences"])
    for row in rows:
        assert corpus.rule_score(row["prompt"], row["chosen"]) > corpus.rule_score(row["prompt"], row["rejected"])
    by_words = sum(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows) / len(rows)
    by_characters = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    assert 0.4 < by_words < 0.6
    assert 0.4 < by_characters < 0.6
