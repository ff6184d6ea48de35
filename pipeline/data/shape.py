"""Rows to examples: what a prompt, a reply and a preference are in the shapes people have. Torch-free.

A row is recognised by its fields alone. Everything that makes it unusable is a `Skip` whose text is the reason.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.messages import TURN as TURN
from pipeline.data.messages import Message as Message
from pipeline.data.messages import Text as Text
from pipeline.data.messages import has_words, is_conversation, messages, tools
from pipeline.data.messages import transcript as transcript
from pipeline.data.row import Row, kind
from pipeline.data.row import Skip as Skip
from pipeline.data.sides import after, alike, shared_text, shared_turns

UNRECOGNISED = "no shape is recognised"
SHAPES = (
    "text; messages; prompt; prompt and completion, also with label; prompt, chosen and rejected; chosen and rejected; "
    "conversations (ShareGPT); instruction, input and output (Alpaca), also with chosen and rejected; instruction and "
    "instances; question and answer"
)


@dataclass(frozen=True)
class Shape:
    """How a row says what it says. `pair` tells that it holds a chosen and a rejected reply."""

    name: str
    conversational: bool = False
    pair: bool = False

    def __str__(self) -> str:
        return f"{self.name} (conversational)" if self.conversational else self.name


@dataclass(frozen=True)
class Example:
    """A prompt and its replies; a reply that the row does not have is None. As text they are what the row says; as messages,
    the prompt's go up to the reply, and a reply is usually one message of the assistant's.

    `margin` is how much better `chosen` is; `label` whether `chosen` is a good reply, where a row has one reply and says so;
    `tools` what the conversation may call; `source` the path, as the recipe writes it, that the row came from, `origin` the
    number of that source in the stage's list, the file and the row's number in it, and `row` its fields.
    """

    prompt: Text
    chosen: Text | None = None
    rejected: Text | None = None
    margin: float | None = None
    label: bool | None = None
    tools: list[Any] | None = None
    source: str = ""
    origin: tuple[int, str, int] = (0, "", 0)
    row: dict[str, Any] = field(default_factory=dict, compare=False)


def recognise(fields: dict[str, Any]) -> Shape | None:
    """The shape of a row with these fields; None when there is none. A field that holds None is taken as absent."""
    has = {name for name, value in fields.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return _pair_shape(fields, has)
    if "messages" in has:
        return Shape("messages", conversational=True)
    if "conversations" in has:
        return Shape("ShareGPT", conversational=True)
    if {"prompt", "completion"} <= has:
        name = "prompt + completion + label" if "label" in has else "prompt + completion"
        return Shape(name, is_conversation(fields["prompt"]) or is_conversation(fields["completion"]))
    if "instruction" in has:
        return Shape("Self-Instruct" if "instances" in has else "Alpaca")
    if "prompt" in has:
        return Shape("prompt", is_conversation(fields["prompt"]))
    if {"question", "answer"} <= has:
        return Shape("question + answer")
    return Shape("text") if "text" in has else None


def _pair_shape(fields: dict[str, Any], has: set[str]) -> Shape:
    conversational = any(is_conversation(fields[name]) for name in ("chosen", "rejected"))
    if "conversations" in has:
        return Shape("ShareGPT pair", conversational=True, pair=True)
    if "prompt" in has:
        return Shape("prompt + chosen + rejected", conversational or is_conversation(fields["prompt"]), pair=True)
    if "instruction" in has:
        return Shape("Alpaca pair", conversational, pair=True)
    if not conversational and TURN in f"{fields['chosen']}":
        return Shape("HH-RLHF transcript pair", pair=True)
    return Shape("chosen + rejected", conversational, pair=True)


# ---------------------------------------------------------------- readers


def demonstration(row: Row, take: str) -> Example:
    """Prompt and one reply: the completion, or the `chosen` or `rejected` side of a preference. Of replies labelled good or
    bad, `take` chooses likewise."""
    shape = _known(row)
    if shape.pair:
        both = preference(row)
        return Example(both.prompt, both.chosen if take == "chosen" else both.rejected, tools=both.tools)
    label = row.fields.get("label") if shape.name.endswith("label") else None
    if isinstance(label, str) and label.strip().lower() in ("true", "false"):
        label = label.strip().lower() == "true"
    if isinstance(label, bool) and label != (take == "chosen"):
        raise Skip("labelled bad" if take == "chosen" else "labelled good", bad=False)
    return _one_reply(row, shape)


def document(row: Row) -> Example:
    """A plain text: the reply to no prompt."""
    shape = _known(row)
    if shape.name != "text":
        raise Skip("not plain text: a row of it has a column `text` and no prompt")
    return _one_reply(row, shape)


def unpaired(row: Row) -> Example:
    """Prompt, one reply, and whether it is a good one."""
    shape, value = _known(row), row.fields.get("label")
    if value is None or value == "":
        raise Skip("missing: label")
    known = {"true": True, "1": True, "false": False, "0": False}
    label = known.get(str(value).strip().lower())
    if label is None:
        raise Skip("label is neither true nor false")
    one = _one_reply(row, shape)
    return Example(one.prompt, one.chosen, label=label, tools=one.tools)


def preference(row: Row) -> Example:
    """Prompt, better and worse reply. Raises Skip when the two are equal, empty or answer different prompts."""
    shape = _known(row)
    absent = [name for name in ("chosen", "rejected") if row.fields.get(name) is None]
    if absent:
        raise Skip("missing: " + ", ".join(absent))
    prompt, chosen, rejected = _both(row.fields, shape)
    if chosen == rejected:
        raise Skip("chosen equals rejected")
    _not_empty(chosen)
    _not_empty(rejected)
    return Example(prompt, chosen, rejected, _margin(row.fields), tools=tools(row.fields.get("tools")))


def prompt_only(row: Row) -> Example:
    """The prompt of a row of any shape but plain `text`."""
    shape, fields = _known(row), row.fields
    if shape.pair:
        prompt = _both(fields, shape)[0]
    elif shape.name in ("messages", "ShareGPT"):
        prompt = _conversation(fields, shape)
        if prompt[-1]["role"] == "assistant":
            prompt = _before(prompt)
    else:
        given = _prompt(fields, shape)
        if given is None:
            raise Skip("missing: prompt")
        prompt = given
        if isinstance(prompt, str) and is_conversation(fields.get("completion")):
            prompt = [{"role": "user", "content": prompt}]
    return Example(prompt, tools=tools(fields.get("tools")))


def plain(text: Text) -> str:
    """A text as one string, to hash and to show."""
    if isinstance(text, str):
        return text
    return "\n".join(
        f"{m['role']}: {m['content']}" + (json.dumps(m["tool_calls"], default=str) if m.get("tool_calls") else "")
        for m in text
    )


# ---------------------------------------------------------------- parts of a row


def _known(row: Row) -> Shape:
    shape = recognise(row.fields)
    if shape is None:
        raise Skip(UNRECOGNISED)
    return shape


def _one_reply(row: Row, shape: Shape) -> Example:
    fields = row.fields
    given = tools(fields.get("tools"))
    if shape.name in ("messages", "ShareGPT"):
        turns = _conversation(fields, shape)
        if turns[-1]["role"] != "assistant":
            raise Skip("the last message is not the assistant's")
        _not_empty(turns[-1:])
        return Example(_before(turns), turns[-1:], tools=given)
    if shape.name == "text":
        text = fields["text"]
        if not isinstance(text, str):
            raise Skip(f"text is {kind(text)}, not text")
        if not text.strip():
            raise Skip("empty text")
        return Example("", text)
    prompt, (name, value) = _prompt(fields, shape), _completion(fields, shape)
    if prompt is None or value is None:
        raise Skip(f"missing: {name if value is None else 'prompt'}")
    prompt, reply = alike(prompt, _side(value, name))
    _not_empty(reply)
    return Example(prompt, reply, tools=given)


def _completion(fields: dict[str, Any], shape: Shape) -> tuple[str, Any]:
    """(field, value) of the reply."""
    if shape.name == "Self-Instruct":
        return "output", _instance(fields).get("output")
    names = {"question + answer": ("answer",), "Alpaca": ("output", "completion", "response")}
    listed = names.get(shape.name, ("completion",))
    name = next((name for name in listed if fields.get(name) is not None), listed[0])
    return name, fields.get(name)


def _prompt(fields: dict[str, Any], shape: Shape) -> Text | None:
    """What stands before the reply, where a field of its own says so. Raises Skip when that is empty."""
    if shape.name.startswith("ShareGPT"):
        return _conversation(fields, shape)
    if fields.get("prompt") is not None:
        return _filled(_side(fields["prompt"], "prompt"))
    if shape.name == "question + answer":
        return _filled(_text(fields["question"], "question"))
    if fields.get("instruction") is None:
        return None
    instruction = _text(fields["instruction"], "instruction")
    _filled(instruction)
    given = _instance(fields).get("input") if shape.name == "Self-Instruct" else fields.get("input")
    more = f"\n\n### Input:\n{_text(given, 'input')}" if given else ""
    return f"### Instruction:\n{instruction}{more}\n\n### Response:\n"


def _instance(fields: dict[str, Any]) -> dict[str, Any]:
    listed = fields["instances"]
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        raise Skip("instances is not a list of objects")
    if len(listed) > 1:
        raise Skip("more than one instance")
    return listed[0]


def _conversation(fields: dict[str, Any], shape: Shape) -> list[Message]:
    """The turns of `messages` or ShareGPT's `conversations`; the latter may have the system's apart."""
    if shape.name == "messages":
        return messages(fields["messages"], "messages")
    turns = messages(fields["conversations"], "conversations")
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _both(fields: dict[str, Any], shape: Shape) -> tuple[Text, Text, Text]:
    """Prompt and the two replies, in one form: all text, or all messages."""
    chosen, rejected = _side(fields["chosen"], "chosen"), _side(fields["rejected"], "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Skip("of chosen and rejected one is text and one messages")
    prompt = _prompt(fields, shape)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return shared_text(chosen, rejected)
        return (*alike(prompt, chosen), alike(prompt, rejected)[1])
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    if isinstance(prompt, list):
        return prompt, after(prompt, chosen), after(prompt, rejected)
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        return [{"role": "user", "content": prompt}], chosen, rejected
    return shared_turns(chosen, rejected)  # a prompt as text beside whole conversations repeats what they begin with


def _before(turns: list[Message]) -> list[Message]:
    if not any(has_words(turn) for turn in turns[:-1]):
        raise Skip("empty prompt")
    return turns[:-1]


def _side(value: Any, name: str) -> Text:
    return messages(value, name) if isinstance(value, list | dict) else _text(value, name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Skip(f"{name} is {kind(value)}, not text")
    return value


def _filled(prompt: Text) -> Text:
    if not (prompt.strip() if isinstance(prompt, str) else any(has_words(turn) for turn in prompt)):
        raise Skip("empty prompt")
    return prompt


def _not_empty(reply: Text) -> None:
    if isinstance(reply, list) and reply[-1]["role"] != "assistant":
        raise Skip("the last message is not the assistant's")
    if not (reply.strip() if isinstance(reply, str) else has_words(reply[-1])):
        raise Skip("empty reply")


def _margin(fields: dict[str, Any]) -> float | None:
    value = fields.get("margin")
    if value is None or value == "":
        return None
    try:
        margin = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise Skip("margin is not a finite number")
    return margin
