"""Conversations: lists of messages as they are in rows, ShareGPT's turns and HH-RLHF's transcripts. Torch-free."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.data.row import Skip, kind

Message = dict[str, Any]
"""A turn: `role`, `content`, and whatever else the row has (`tool_calls`, `name`, `tool_call_id`, …)."""
Text = str | list[Message]
"""What a prompt or a reply is: plain text, or messages for a chat template."""

TURN = "\n\nAssistant:"
_TURNS = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


def messages(value: Any, name: str) -> list[Message]:
    """The messages of field `name`. Raises Skip for what is no list of turns with a role and a content.

    Taken: {role, content}, ShareGPT's {from, value}, one turn alone, a list written as JSON text (in a CSV), and contents in
    parts that are all text. Keys that hold nothing are left out: Parquet gives every turn all keys that any turn has.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Skip(f"{name} is text, not a list of messages") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Skip(f"{name} is {kind(value)}, not a list of messages")
    if not value:
        raise Skip(f"{name} is an empty list")
    return [_message(turn, name) for turn in value]


def is_conversation(value: Any) -> bool:
    """Whether a field's value looks like messages rather than text."""
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(turn, dict) for turn in value))


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise Skip(f"a message of {name} is {kind(turn)}, not an object")
    turn = dict(_present(turn))
    if "from" in turn and "role" not in turn:
        turn = _shared(turn, name)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not role:
        raise Skip(f"a message of {name} has no role")
    if content is None and role == "assistant" and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined(content, name)
    if not isinstance(content, str):
        raise Skip(f"the content of a message of {name} is {kind(content)}, not text")
    return {**turn, "role": role, "content": content}


def _shared(turn: Message, name: str) -> Message:
    """A turn of ShareGPT. A `function_call` holds the call as JSON, as LLaMA-Factory writes it."""
    speaker, value = turn.pop("from"), turn.pop("value", None)
    if not isinstance(speaker, str):
        raise Skip(f"a message of {name} has no role")
    if speaker != "function_call":
        return {**turn, "role": _ROLES.get(speaker, speaker), "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise Skip("a function call is not JSON") from None
    listed = calls if isinstance(calls, list) else [calls]
    return {
        **turn,
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": c} for c in listed],
    }


def _joined(parts: list[Any], name: str) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise Skip(f"the content of a message of {name} is not text alone")
    return "".join(part["text"] for part in parts)


def _present(value: Any) -> Any:
    """`value` without keys that hold None, at any depth."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def tools(value: Any) -> list[Any] | None:
    """The tools a conversation may call, from the row's `tools`: a list, or one written as JSON. Raises Skip for others."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Skip("tools is not JSON") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Skip("tools is not a list of objects")
    return list(_present(value))


def has_words(turn: Message) -> bool:
    """Whether a message says or calls something."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def transcript(text: str) -> list[Message] | None:
    """An HH-RLHF transcript as messages; None for other text. Contents are stripped; an open turn of the assistant's at
    the end, where a reply is to come, is left out; turns of one speaker in a row become one."""
    before, *parts = _TURNS.split(text)
    if before.strip() or not parts or parts[0] != "Human":
        return None
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _SPEAKERS[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns
