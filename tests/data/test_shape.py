"""Rows to examples: prompt and replies of every format, the reasons to skip a row, and rows that are refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.read import Row, rows
from pipeline.data.shape import Example, Skip, demonstration, plain, preference, prompt_only
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is Oslo?\n\nAssistant:"
ASKED = {"role": "user", "content": "Where is Oslo?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [SYSTEM, ASKED]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(**fields: Any) -> Row:
    return Row(fields, "rows.jsonl", 7)


INSTRUCTION = "### Instruction:\nAdd.\n\n### Response:\n"
WITH_INPUT = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example("p", "c")),
        ({"prompt": CHAT, "completion": "In Norway."}, Example(CHAT, "In Norway.")),
        ({"messages": [*CHAT, said("In Norway.")]}, Example(CHAT, "In Norway.")),
        ({"text": "Once upon a time."}, Example("", "Once upon a time.")),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, Example(WITH_INPUT, "3")),
        ({"instruction": "Add.", "input": "", "output": "3"}, Example(INSTRUCTION, "3")),
        ({"instruction": "Add.", "output": "3"}, Example(INSTRUCTION, "3")),
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, Example("p", "good")),
        ({"chosen": HUMAN + " In Norway.", "rejected": HUMAN + " No idea."}, Example(HUMAN, " In Norway.")),
        (
            {"instruction": "Add.", "output": "3", "chosen": "It is 3.", "rejected": "3!"},
            Example(INSTRUCTION, "It is 3."),
        ),
    ],
    ids=[
        "prompt and completion",
        "messages as prompt",
        "messages",
        "text",
        "Alpaca",
        "Alpaca with empty input",
        "Alpaca without input",
        "preference",
        "HH-RLHF",
        "Alpaca preference",
    ],
)
def test_demonstration(fields: dict[str, Any], expected: Example) -> None:
    assert demonstration(row(**fields), "chosen") == expected


def test_demonstration_can_take_the_rejected_side() -> None:
    assert demonstration(row(prompt="p", chosen="good", rejected="bad"), "rejected") == Example("p", "bad")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, Example("p", "good", "bad")),
        ({"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2}, Example("p", "good", "bad", 2.0)),
        (
            {"chosen": HUMAN + " In Norway.", "rejected": HUMAN + " No idea."},
            Example(HUMAN, " In Norway.", " No idea."),
        ),
        (
            {"chosen": [*CHAT, said("In Norway.")], "rejected": [*CHAT, said("No idea.")]},
            Example(CHAT, "In Norway.", "No idea."),
        ),
        (
            {"prompt": CHAT, "chosen": [said("In Norway.")], "rejected": [said("No idea.")]},
            Example(CHAT, "In Norway.", "No idea."),
        ),
        (
            {"prompt": "p", "chosen": [*CHAT, said("In Norway.")], "rejected": [*CHAT, said("No idea.")]},
            Example("p", "In Norway.", "No idea."),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "chosen": "It is 3.", "rejected": "3!"},
            Example(WITH_INPUT, "It is 3.", "3!"),
        ),
    ],
    ids=["explicit", "margin", "HH-RLHF", "message lists", "messages apart", "prompt beside message lists", "Alpaca"],
)
def test_preference(fields: dict[str, Any], expected: Example) -> None:
    assert preference(row(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": CHAT}, CHAT),
        ({"prompt": "p", "completion": "c"}, "p"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, WITH_INPUT),
        ({"messages": [*CHAT, said("In Norway.")]}, CHAT),
        ({"messages": CHAT}, CHAT),
        ({"chosen": HUMAN + " In Norway.", "rejected": HUMAN + " In Norway."}, HUMAN),
        ({"chosen": [*CHAT, said("a")], "rejected": [*CHAT, said("b")]}, CHAT),
    ],
    ids=[
        "prompt",
        "messages as prompt",
        "more than a prompt",
        "Alpaca",
        "messages",
        "messages without a reply",
        "HH-RLHF",
        "message lists",
    ],
)
def test_prompt_only(fields: dict[str, Any], expected: Any) -> None:
    assert prompt_only(row(**fields)) == Example(expected)


def test_a_row_has_one_prompt_whichever_stage_reads_it() -> None:
    for fields in (
        {"chosen": HUMAN + " a", "rejected": HUMAN + " b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"chosen": [*CHAT, said("a")], "rejected": [*CHAT, said("b")]},
    ):
        read = [demonstration(row(**fields), "chosen"), preference(row(**fields)), prompt_only(row(**fields))]
        assert read[0].prompt == read[1].prompt == read[2].prompt


Reader = Callable[[Row], Example]


def chosen_side(given: Row) -> Example:
    return demonstration(given, "chosen")


OTHER = HUMAN.replace("Oslo", "Rome")


@pytest.mark.parametrize(
    ("reader", "fields", "reason"),
    [
        (preference, {"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen equals rejected"),
        (preference, {"chosen": HUMAN + " a", "rejected": HUMAN + " a"}, "chosen equals rejected"),
        (preference, {"prompt": "p", "chosen": " \n", "rejected": "b"}, "empty reply"),
        (preference, {"chosen": HUMAN + " a", "rejected": HUMAN}, "empty reply"),
        (preference, {"chosen": HUMAN + " a", "rejected": OTHER + " b"}, "answer different prompts"),
        (preference, {"chosen": [ASKED, said("a")], "rejected": [*CHAT, said("b")]}, "answer different prompts"),
        (prompt_only, {"chosen": HUMAN + " a", "rejected": OTHER + " b"}, "answer different prompts"),
        (chosen_side, {"prompt": "p", "completion": "  "}, "empty reply"),
        (chosen_side, {"messages": [ASKED, said("")]}, "empty reply"),
        (chosen_side, {"messages": [said("Hello!"), ASKED]}, "last message is not the assistant's"),
        (chosen_side, {"chosen": HUMAN + " a", "rejected": OTHER + " b"}, "answer different prompts"),
    ],
)
def test_unusable_row_is_skipped_with_its_reason(reader: Reader, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Skip, match=reason):
        reader(row(**fields))


@pytest.mark.parametrize(
    ("reader", "fields", "words"),
    [
        (preference, {"prompt": "p", "chosen": "a"}, ["fields found: chosen, prompt", "expected chosen and rejected"]),
        (preference, {"prompt": "p", "chosen": "a", "rejected": None}, ["expected chosen and rejected"]),
        (preference, {"prompt": "p", "chosen": "a", "rejected": 3}, ["a reply is int", "text or a list of messages"]),
        (preference, {"chosen": "a", "rejected": "b"}, ["fields found: chosen, rejected", "Assistant:"]),
        (
            preference,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"},
            ["the margin is 'much'", "a number"],
        ),
        (preference, {"chosen": [], "rejected": []}, ["`chosen` is not a list of messages"]),
        (chosen_side, {"question": "q", "answer": "a"}, ["fields found: answer, question", "instruction and output"]),
        (chosen_side, {"prompt": "p"}, ["fields found: prompt", "prompt and completion"]),
        (chosen_side, {"prompt": [{"role": "user"}], "completion": "c"}, ["`prompt` is not a list of messages"]),
        (chosen_side, {"messages": "hello"}, ["`messages` is not a list of messages", "role"]),
        (prompt_only, {"text": "t"}, ["fields found: text", "expected prompt, instruction, messages"]),
        (prompt_only, {}, ["fields found: none"]),
    ],
)
def test_row_of_no_known_shape_is_named(reader: Reader, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        reader(row(**fields))
    message = str(raised.value)
    assert message.startswith("data rows.jsonl, row 7: ")
    for word in words:
        assert word in message


def test_plain_is_the_text_itself_or_the_messages_line_by_line() -> None:
    assert plain("p") == "p"
    assert plain(CHAT) == "system: Be brief.\nuser: Where is Oslo?"


def test_real_preferences_are_skipped_for_the_reasons_counted_by_hand(hh_rlhf: Path) -> None:
    reasons: Counter[str] = Counter()
    for given in rows(str(hh_rlhf)):
        try:
            example = preference(given)
            assert str(example.prompt).endswith("\n\nAssistant:")
        except Skip as reason:
            reasons[str(reason)] += 1
    # The counts in the data's README, made with another program.
    assert reasons.pop("chosen equals rejected") == 36
    assert reasons.pop("chosen and rejected answer different prompts") == 17
    assert reasons == {"empty reply": 11}
