"""Rows to examples: prompt and replies of every format, and the reasons why a row is not used."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.read import Row, rows
from pipeline.data.shape import (
    Example,
    Skip,
    demonstration,
    plain,
    preference,
    prompt_only,
    recognise,
    transcript,
    unpaired,
)

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
        ({"prompt": CHAT, "completion": "In Norway."}, Example(CHAT, [said("In Norway.")])),
        ({"messages": [*CHAT, said("In Norway.")]}, Example(CHAT, [said("In Norway.")])),
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
            Example(CHAT, [said("In Norway.")], [said("No idea.")]),
        ),
        (
            {"prompt": CHAT, "chosen": [said("In Norway.")], "rejected": [said("No idea.")]},
            Example(CHAT, [said("In Norway.")], [said("No idea.")]),
        ),
        (
            {"prompt": "p", "chosen": [*CHAT, said("In Norway.")], "rejected": [*CHAT, said("No idea.")]},
            Example(CHAT, [said("In Norway.")], [said("No idea.")]),
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
    ("reader", "fields", "reason"),
    [
        (preference, {"prompt": "p", "chosen": "a"}, "missing: rejected"),
        (preference, {"prompt": "p"}, "missing: chosen, rejected"),
        (preference, {"prompt": "p", "chosen": "a", "rejected": None}, "missing: rejected"),
        (preference, {"prompt": "p", "chosen": "a", "rejected": 3}, "rejected is a number, not text"),
        (preference, {"prompt": "p", "chosen": "a", "rejected": [said("b")]}, "of chosen and rejected one is text"),
        (preference, {"chosen": "a", "rejected": "b"}, "chosen and rejected share no prompt"),
        (preference, {"chosen": "Same text.", "rejected": "Same text."}, "chosen equals rejected"),
        (
            preference,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"},
            "margin is not a finite number",
        ),
        (
            preference,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": math.nan},
            "margin is not a finite number",
        ),
        (preference, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "margin is not a finite number"),
        (preference, {"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
        (preference, {"chosen": [], "rejected": []}, "chosen is an empty list"),
        (preference, {"chosen": [said("a")], "rejected": [said("b")]}, "answer different prompts"),
        (chosen_side, {"turns": ["q"], "answer": "a"}, "no shape is recognised"),
        (chosen_side, {}, "no shape is recognised"),
        (chosen_side, {"prompt": "p"}, "missing: completion"),
        (chosen_side, {"prompt": 3.5, "completion": "c"}, "prompt is a number, not text"),
        (chosen_side, {"prompt": [1], "completion": "c"}, "a message of prompt is a number, not an object"),
        (
            chosen_side,
            {"prompt": [{"role": "user"}], "completion": "c"},
            "the content of a message of prompt is nothing",
        ),
        (chosen_side, {"prompt": " ", "completion": "c"}, "empty prompt"),
        (chosen_side, {"text": "\n"}, "empty text"),
        (chosen_side, {"text": 3}, "text is a number, not text"),
        (chosen_side, {"messages": "hello"}, "messages is text, not a list of messages"),
        (chosen_side, {"messages": [said("Hi.")]}, "empty prompt"),
        (chosen_side, {"messages": [{"content": "x"}]}, "a message of messages has no role"),
        (chosen_side, {"instruction": "Add.", "input": 3, "output": "3"}, "input is a number, not text"),
        (chosen_side, {"instruction": "", "output": "3"}, "empty prompt"),
        (chosen_side, {"instruction": "Add."}, "missing: output"),
        (chosen_side, {"messages": [ASKED, said("a")], "tools": "{"}, "tools is not JSON"),
        (chosen_side, {"messages": [ASKED, said("a")], "tools": {"a": 1}}, "tools is not a list of objects"),
        (prompt_only, {"text": "t"}, "missing: prompt"),
        (unpaired, {"prompt": "p", "completion": "c"}, "missing: label"),
        (unpaired, {"prompt": "p", "completion": "c", "label": "good"}, "label is neither true nor false"),
        (unpaired, {"prompt": "p", "completion": "c", "label": 2}, "label is neither true nor false"),
    ],
)
def test_what_is_wrong_with_a_row_is_one_short_reason(reader: Reader, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Skip) as raised:
        reader(row(**fields))
    assert reason in str(raised.value)
    assert raised.value.bad
    assert "7" not in str(raised.value)  # nothing of the row's place: equal faults are counted together


@pytest.mark.parametrize(
    ("fields", "name", "conversational"),
    [
        ({"text": "t"}, "text", False),
        ({"messages": [ASKED]}, "messages", True),
        ({"prompt": "p"}, "prompt", False),
        ({"prompt": CHAT}, "prompt", True),
        ({"prompt": "p", "completion": "c"}, "prompt + completion", False),
        ({"prompt": CHAT, "completion": [said("c")]}, "prompt + completion", True),
        ({"prompt": "p", "completion": "c", "label": False}, "prompt + completion + label", False),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "prompt + chosen + rejected", False),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "chosen + rejected", False),
        ({"chosen": [*CHAT, said("a")], "rejected": [*CHAT, said("b")]}, "chosen + rejected", True),
        ({"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, "HH-RLHF transcript pair", False),
        ({"instruction": "Add.", "output": "3", "text": "both"}, "Alpaca", False),
        ({"instruction": "Add.", "chosen": "3", "rejected": "4"}, "Alpaca pair", False),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "ShareGPT", True),
        ({"conversations": [], "chosen": {"from": "gpt"}, "rejected": {}}, "ShareGPT pair", True),
        ({"question": "q", "answer": "a"}, "question + answer", False),
        ({"instruction": "Add.", "instances": []}, "Self-Instruct", False),
    ],
)
def test_shapes_are_recognised_by_fields(fields: dict[str, Any], name: str, conversational: bool) -> None:
    shape = recognise({**fields, "unknown": 1, "margin": None})
    assert shape is not None
    assert (shape.name, shape.conversational) == (name, conversational)
    assert str(shape) == name + " (conversational)" * conversational


def test_no_shape() -> None:
    assert recognise({"label": 1, "sentence": "s", "text": None}) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # The first is TRL's own example of an implicit prompt.
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),  # no word is cut in two
        ("Say it\nnow", "Say it\nnever", ("Say it", "\nnow", "\nnever")),
    ],
)
def test_prompt_that_two_texts_share(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    assert preference(row(chosen=chosen, rejected=rejected)) == Example(*expected)


def test_prompt_as_text_with_replies_as_messages() -> None:
    """One message each: the prompt is a turn of the user's. Whole conversations repeat the prompt (UltraFeedback)."""
    asked = {"role": "user", "content": "p"}
    expected = Example([asked], [said("a")], [said("b")])
    assert preference(row(prompt="p", chosen=[said("a")], rejected=[said("b")])) == expected
    assert preference(row(prompt="p", chosen=[asked, said("a")], rejected=[asked, said("b")])) == expected
    assert preference(row(prompt=[asked], chosen=[asked, said("a")], rejected=[asked, said("b")])) == expected
    assert preference(row(prompt=[asked], chosen="a", rejected="b")) == expected
    assert demonstration(row(prompt="p", completion=[said("a")]), "chosen") == Example([asked], [said("a")])
    assert prompt_only(row(prompt="p", completion=[said("a")])) == Example([asked])


def test_share_gpt() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Bye"}]
    history = [{"role": "user", "content": "Hi"}, said("Hello"), {"role": "user", "content": "Bye"}]
    last = {"from": "gpt", "value": "So long"}
    assert demonstration(row(conversations=[*turns, last]), "chosen") == Example(history, [said("So long")])
    assert demonstration(row(conversations=[*turns, last], system="Be brief."), "chosen").prompt == [SYSTEM, *history]
    assert prompt_only(row(conversations=turns)) == Example(history)
    pair = row(conversations=turns, chosen=last, rejected={"from": "gpt", "value": "No"})
    assert preference(pair) == Example(history, [said("So long")], [said("No")])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tool_calls_keep_their_keys_and_need_no_content() -> None:
    """As Parquet gives them: every turn has every key, None where it said nothing."""
    empty = {"tool_calls": None, "name": None}
    turns = [
        {"role": "user", "content": "1 + 1?", **empty},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": None}], "name": None},
        {"role": "tool", "content": "2", "tool_calls": None, "name": "add"},
        {"role": "assistant", "content": "2.", **empty},
    ]
    tool = {"type": "function", "function": {"name": "add"}}
    expected = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    found = demonstration(row(messages=turns, tools=json.dumps([tool])), "chosen")
    assert found == Example(expected, [said("2.")], tools=[tool])
    assert demonstration(row(messages=turns[:2]), "chosen") == Example(expected[:1], expected[1:2])
    assert "add" in plain(expected)
    shared = [{"from": "human", "value": "1 + 1?"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    assert demonstration(row(conversations=shared), "chosen") == Example(expected[:1], expected[1:2])


def test_contents_in_parts_and_messages_as_json() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "Oslo?"}]}]
    assert prompt_only(row(prompt=parts)) == Example([ASKED])
    assert demonstration(row(messages=json.dumps([ASKED, said("a")])), "chosen") == Example([ASKED], [said("a")])
    with pytest.raises(Skip, match="not text alone"):
        prompt_only(row(prompt=[{"role": "user", "content": [{"type": "image", "image": "x"}]}]))


@pytest.mark.parametrize(("value", "label"), [(True, True), ("False", False), (1, True), ("0", False), (0.0, None)])
def test_unpaired(value: Any, label: bool | None) -> None:
    if label is None:
        with pytest.raises(Skip, match="label is neither"):
            unpaired(row(prompt="p", completion="c", label=value))
    else:
        assert unpaired(row(prompt="p", completion="c", label=value)) == Example("p", "c", label=label)


def test_a_reply_labelled_bad_is_no_demonstration_and_not_a_bad_row() -> None:
    assert demonstration(row(prompt="p", completion="c", label=True), "chosen") == Example("p", "c")
    assert demonstration(row(prompt="p", completion="c", label="false"), "rejected") == Example("p", "c")
    with pytest.raises(Skip, match="labelled bad") as raised:
        demonstration(row(prompt="p", completion="c", label=False), "chosen")
    assert not raised.value.bad


def test_transcripts_as_messages() -> None:
    hello = [{"role": "user", "content": "Hi"}, said("Hello!"), ASKED]
    assert transcript(HUMAN) == hello
    assert transcript(HUMAN + " In Norway.\n") == [*hello, said("In Norway.")]
    assert transcript("\n\nHuman: a\n\nHuman: b\n\nAssistant: c") == [{"role": "user", "content": "a\n\nb"}, said("c")]
    for other in ("", "Hello", "\n\nAssistant: a", "x\n\nHuman: a"):
        assert transcript(other) is None


def test_real_transcripts_as_messages(hh_rlhf: Path) -> None:
    """Every transcript begins with the human and ends with the assistant, and no word is lost."""
    for given in rows(str(hh_rlhf / "harmless-base.test.jsonl.gz")):
        turns = transcript(given.fields["chosen"])
        assert turns is not None
        said = re.sub(r"\n\n(Human|Assistant):", " ", given.fields["chosen"]).split()
        assert " ".join(turn["content"] for turn in turns).split() == said


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
