"""Prompt and replies of a preference: split off what two sides share, and put all in one form. Torch-free."""

from __future__ import annotations

from pipeline.data.messages import TURN, Message, Text
from pipeline.data.row import Skip

DIFFERENT = "chosen and rejected answer different prompts"


def shared_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split off what both sides begin with: a transcript up to its last turn, or the words that are the same."""
    if TURN in chosen or TURN in rejected:
        (head, turn, better), (other, _, worse) = chosen.rpartition(TURN), rejected.rpartition(TURN)
        if head != other:
            raise Skip(DIFFERENT)
        return head + turn, better, worse
    end = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:
        end = min(len(chosen), len(rejected))
    while end and not chosen[end : end + 1].isspace():  # back to the end of the last whole word
        end -= 1
    if not chosen[:end].strip():
        raise Skip("chosen equals rejected" if chosen == rejected else "chosen and rejected share no prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def shared_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split off the turns that both sides begin with; what is left must be replies alone."""
    end, most = 0, min(len(chosen), len(rejected)) - 1
    while end < most and chosen[end] == rejected[end]:
        end += 1
    prompt, better, worse = chosen[:end], chosen[end:], rejected[end:]
    if not prompt or any(turn["role"] not in ("assistant", "tool") for turn in (*better, *worse)):
        raise Skip(DIFFERENT)
    return prompt, better, worse


def after(prompt: list[Message], reply: list[Message]) -> list[Message]:
    """A reply without the prompt, which some data sets repeat in it."""
    return reply[len(prompt) :] if len(reply) > len(prompt) and reply[: len(prompt)] == prompt else reply


def alike(prompt: Text, reply: Text) -> tuple[Text, Text]:
    """Prompt and reply in one form: if either is messages, both are."""
    if isinstance(prompt, str) and isinstance(reply, list):
        return [{"role": "user", "content": prompt}], reply
    if isinstance(prompt, list):
        said = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else after(prompt, reply)
        return prompt, said
    return prompt, reply
