"""Rows to examples: what a prompt, a reply and a preference are in the formats people have. Torch-free.

Recognised: `prompt`+`completion`, `prompt`+`chosen`+`rejected`, `chosen`+`rejected` with the prompt implied (HH-RLHF
transcripts or message lists), `messages`, `text`, `prompt` alone, and Alpaca's `instruction`/`input`/`output`, also with
`chosen` and `rejected`. A text is a string, or a list of {role, content} messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.data.read import Row
from pipeline.errors import UserError

Text = str | list[dict[str, str]]
TURN = "\n\nAssistant:"


@dataclass(frozen=True)
class Example:
    """A prompt and its replies; a reply that the row does not have is None. `margin` is how much better `chosen` is;
    `source` is the path, as the recipe writes it, that the row came from, and `row` its fields."""

    prompt: Text
    chosen: str | None = None
    rejected: str | None = None
    margin: float | None = None
    source: str = ""
    row: dict[str, Any] = field(default_factory=dict, compare=False)


class Skip(Exception):
    """A well-formed row that cannot be used; its text is the reason, and the stage counts it."""


def demonstration(row: Row, take: str) -> Example:
    """Prompt and one reply: the completion, or the `chosen` or `rejected` side of a preference."""
    if {"chosen", "rejected"} <= row.fields.keys():
        both = preference(row)
        return Example(both.prompt, both.chosen if take == "chosen" else both.rejected)
    prompt, completion = _prompt(row), _field(row, "completion", "output")
    if "messages" in row.fields:
        *history, last = _messages(row, "messages")
        if last["role"] != "assistant":
            raise Skip("the last message is not the assistant's")
        prompt, completion = history, last["content"]
    elif "text" in row.fields and prompt is None:
        prompt, completion = "", row.fields["text"]
    if prompt is None or not isinstance(completion, str):
        raise _missing(row, "prompt and completion, chosen and rejected, messages, text, or instruction and output")
    if not completion.strip():
        raise Skip("empty reply")
    return Example(prompt, completion)


def preference(row: Row) -> Example:
    """Prompt, better and worse reply. Raises Skip when the two are equal, empty or answer different prompts."""
    chosen, rejected = row.fields.get("chosen"), row.fields.get("rejected")
    if chosen is None or rejected is None:
        raise _missing(row, "chosen and rejected")
    prompt = _prompt(row)
    if prompt is None:
        prompt, chosen, rejected = _implied(row, chosen, rejected)
    chosen, rejected = _reply(row, chosen), _reply(row, rejected)
    if chosen == rejected:
        raise Skip("chosen equals rejected")
    if not chosen.strip() or not rejected.strip():
        raise Skip("empty reply")
    return Example(prompt, chosen, rejected, _margin(row))


def prompt_only(row: Row) -> Example:
    """The prompt of a row of any shape."""
    prompt = _prompt(row)
    if prompt is None and {"chosen", "rejected"} <= row.fields.keys():
        prompt = _implied(row, row.fields["chosen"], row.fields["rejected"])[0]
    elif prompt is None and "messages" in row.fields:
        messages = _messages(row, "messages")
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if prompt is None:
        raise _missing(row, "prompt, instruction, messages, or chosen and rejected")
    return Example(prompt)


def plain(text: Text) -> str:
    """A text as one string, to hash and to show."""
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)


def _prompt(row: Row) -> Text | None:
    fields = row.fields
    if "prompt" in fields:
        prompt = fields["prompt"]
        return prompt if isinstance(prompt, str) else _messages(row, "prompt")
    if isinstance(fields.get("instruction"), str):
        given = f"\n\n### Input:\n{fields['input']}" if fields.get("input") else ""
        return f"### Instruction:\n{fields['instruction']}{given}\n\n### Response:\n"
    return None


def _field(row: Row, *names: str) -> Any:
    return next((row.fields[name] for name in names if row.fields.get(name) is not None), None)


def _reply(row: Row, value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        return str(value[-1]["content"])
    if not isinstance(value, str):
        raise UserError(
            f"data {row.where}", f"a reply is {type(value).__name__}", expected="text or a list of messages"
        )
    return value


def _margin(row: Row) -> float | None:
    value = row.fields.get("margin")
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"data {row.where}", f"the margin is {value!r}", expected="a number") from None


def _messages(row: Row, name: str) -> list[dict[str, str]]:
    value = row.fields[name]
    if not (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        raise UserError(
            f"data {row.where}", f"`{name}` is not a list of messages", expected="[{role: …, content: …}, …]"
        )
    return value


def _implied(row: Row, chosen: Any, rejected: Any) -> tuple[Text, Any, Any]:
    """Split the prompt that both sides share off a transcript or a message list."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        head, turn, better = chosen.rpartition(TURN)
        other, _, worse = rejected.rpartition(TURN)
        if not turn:
            raise _missing(row, f"prompt, or transcripts with {TURN!r}")
        if head != other:
            raise Skip("chosen and rejected answer different prompts")
        return head + turn, better, worse
    liked, disliked = _messages(row, "chosen"), _messages(row, "rejected")
    if liked[:-1] != disliked[:-1]:
        raise Skip("chosen and rejected answer different prompts")
    return liked[:-1], liked[-1]["content"], disliked[-1]["content"]


def _missing(row: Row, expected: str) -> UserError:
    return UserError(
        f"data {row.where}",
        "fields found: " + (", ".join(sorted(row.fields)) or "none"),
        expected=expected,
        fix="add the missing field or remove the row",
    )
