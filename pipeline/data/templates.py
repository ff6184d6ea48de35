"""Chat templates as Hugging Face has them: the named ones, the default of a base model without one, where a reply ends.

A template is part of the tokenizer and is published with it. Free of torch; the functions take a transformers tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.errors import UserError

PLAIN = """\
{%- set names = {'system': 'System', 'user': 'Human', 'tool': 'Tool'} %}
{%- if tools %}
    {{- '\\n\\nTools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '\\n\\nAssistant:' }}
        {%- if message.content %}
            {{- ' ' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\nCall: ' + ((call.function or call) | tojson) }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role in names %}
        {{- '\\n\\n' + names[message.role] + ': ' + message.content }}
    {%- else %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""
"""HH-RLHF's text. It needs no token that a tokenizer with EOS does not have."""

CHATML = """\
{%- set first = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (first + '\\n\\n' if first else '') + 'You may call these tools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\nA call is written <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>' + ((call.function or call) | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

BOS = "{{- bos_token }}\n"
"""What stands before a named template where the tokenizer opens every text with its BOS."""

FILE = ".jinja"
RECORD = "relay_added_tokens"
"""The key of tokenizer_config.json that names the tokens which a recipe added and whose embeddings therefore train."""

ERRORS = (TemplateError, TypeError, ValueError)
"""What rendering raises for a conversation that the template does not know."""

_SAID = "Yes."
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


@dataclass(frozen=True)
class Template:
    """A template's text, the tokens it needs, and the one of them that ends a turn; that is then the tokenizer's EOS."""

    text: str
    tokens: tuple[str, ...] = ()
    end: str | None = None


NAMED = {"plain": Template(PLAIN), "chatml": Template(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")}


def find(name: str) -> Template:
    """The template that a recipe names: one of `NAMED`, or a file."""
    return NAMED[name] if name in NAMED else Template(Path(name).read_text(encoding="utf-8"))


def text_for(tok: Any, name: str) -> str:
    """The text of template `name` for this tokenizer."""
    return _opening(tok) + find(name).text if name in NAMED else find(name).text


def _opening(tok: Any) -> str:
    """What opens a text, so that a conversation and the same words as one string get the same ids."""
    bos = tok.bos_token_id
    return BOS if bos is not None and bos in list(tok("")["input_ids"])[:1] else ""


def default(tok: Any) -> str:
    """The template of a base model without one."""
    return text_for(tok, "plain")


def is_default(tok: Any) -> bool:
    """Whether conversations are plain text to this tokenizer: it has no template, or the default."""
    return tok.chat_template is None or tok.chat_template in (PLAIN, BOS + PLAIN)


def marked(template: str) -> bool:
    """Whether a template marks the assistant's words with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\b", template) is not None


def put(tok: Any, name: str | None, more: Iterable[str] = ()) -> list[str]:
    """Give `tok` template `name` (its own when None) and the tokens that this and `more` need; the tokens it lacked."""
    named = find(name) if name is not None else Template("")
    vocabulary = tok.get_vocab()
    lacking = [token for token in dict.fromkeys([*named.tokens, *more]) if token not in vocabulary]
    tok.add_special_tokens({"additional_special_tokens": lacking}, replace_extra_special_tokens=False)
    if named.end is not None:
        tok.eos_token = named.end
    if name is not None:
        tok.chat_template = text_for(tok, name)
    tok.init_kwargs.pop(RECORD, None)
    if lacking:
        tok.init_kwargs[RECORD] = lacking
    return lacking


def added(tok: Any) -> list[int]:
    """Ids of the tokens that the recipe added, ascending."""
    return sorted(tok.convert_tokens_to_ids(token) for token in tok.init_kwargs.get(RECORD, []))


def render(tok: Any, messages: list[dict[str, Any]], tools: list[Any] | None = None, *, ask: bool = False) -> str:
    """A conversation as text; with `ask`, up to where the assistant's next words begin."""
    own = tok.chat_template is not None
    return str(
        tok.apply_chat_template(
            messages,
            tools=tools,
            chat_template=None if own else default(tok),
            add_generation_prompt=ask,
            tokenize=False,
        )
    )


def ends(tok: Any) -> list[int]:
    """The tokens that close a reply in training: what the template writes after the assistant's words, and after a call
    where that is another. Raises UserError when the template closes a reply with no token of its own: generation could
    not stop there."""
    where = f"chat template of {tok.name_or_path}"
    try:
        words, tail = _closing(tok, {"role": "assistant", "content": _SAID}, _SAID)
    except ERRORS as error:
        raise UserError(
            where,
            f"it renders no question with its answer: {told(error)}",
            fix="mend it, or choose `chat_template: plain`",
        ) from None
    if words is None:
        raise UserError(
            where,
            f"it ends a reply with {tail!r}, and generation stops on {tok.eos_token!r}",
            expected="one token that both end a reply with",
            fix="write {{ eos_token }} after the assistant's words, or choose `chat_template: plain`",
        )
    try:
        call, _ = _closing(tok, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, "sky")
    except ERRORS:  # a template without tools
        call = None
    return list(dict.fromkeys([words, *([] if call is None else [call])]))


def _closing(tok: Any, reply: dict[str, Any], last: str) -> tuple[int | None, str]:
    """(the first special or added token after `last`, the last words of `reply`; all that stands there)."""
    _, found, tail = render(tok, [{"role": "user", "content": "a"}, reply]).rpartition(last)
    special = {*tok.all_special_ids, *tok.get_added_vocab().values()}
    ids = tok(tail, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in ids if token in special), None), tail


def told(error: Exception) -> str:
    """The first line of what a template says of a conversation that it does not render."""
    return (str(error).splitlines() or [type(error).__name__])[0]
