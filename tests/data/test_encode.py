"""Token ids and labels of conversations: expected values are written out piece by piece with the bare tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from pipeline.data import encode, templates
from pipeline.data.encode import Encoder
from pipeline.data.shape import Example, Message, Skip
from tests.support.tiny import QUICKSTART

pytestmark = pytest.mark.fast

LIBRARY = Path(trl.__file__).parent / "chat_templates"
LONG = 10_000
EOS = 1
SYSTEM = {"role": "system", "content": "Be kind."}
TALK: list[Message] = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "What does she see?"},
]
REPLY: list[Message] = [{"role": "assistant", "content": "An old mirror."}]


@pytest.fixture
def tok() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / "base")


@pytest.fixture
def chatml(tok: Any) -> Any:
    """<|im_start|> is 511 and <|im_end|> 512."""
    templates.put(tok, "chatml")
    return tok


def ids_of(tok: Any, *parts: str | int) -> list[int]:
    """Text tokenised part by part; numbers are ids."""
    found: list[int] = []
    for part in parts:
        found += [part] if isinstance(part, int) else tok(part, add_special_tokens=False)["input_ids"]
    return found


def row(tok: Any, prompt: Any, reply: Any, loss_on: str, tools: list[Any] | None = None) -> tuple[list[int], list[int]]:
    found = encode.demonstration(Encoder(tok), Example(prompt, reply, tools=tools), LONG, loss_on)
    assert len(found["input_ids"]) == len(found["labels"])
    assert all(label in (-100, token) for token, label in zip(found["input_ids"], found["labels"], strict=True))
    return found["input_ids"], [label for label in found["labels"] if label != -100]


def test_text_stays_text(tok: Any) -> None:
    ids, learned = row(tok, "What does she see?", " An old mirror.", "completion")
    assert ids == ids_of(tok, "What does she see?", " An old mirror.", EOS)
    assert learned == ids_of(tok, " An old mirror.", EOS)
    assert row(tok, "What does she see?", " An old mirror.", "all")[1] == ids
    assert row(tok, "What does she see?", " An old mirror.", "assistant")[1] == learned


def test_the_default_template_gives_messages_the_ids_of_text(tok: Any) -> None:
    text = "\n\nHuman: What does she see?\n\nAssistant:"
    assert row(tok, TALK[2:], REPLY, "completion") == row(tok, text, " An old mirror.", "completion")
    assert Encoder(tok).prompt(TALK[2:]) == tok(text)["input_ids"]


def test_the_last_turn_or_all_of_the_assistants(tok: Any) -> None:
    first = "\n\nHuman: Hello?\n\nAssistant:"
    second = "\n\nHuman: What does she see?\n\nAssistant:"
    whole = ids_of(tok, first, " Yes.", EOS, second, " An old mirror.", EOS)
    assert row(tok, TALK, REPLY, "completion") == (whole, ids_of(tok, " An old mirror.", EOS))
    assert row(tok, TALK, REPLY, "assistant") == (whole, ids_of(tok, " Yes.", EOS, " An old mirror.", EOS))
    assert row(tok, TALK, REPLY, "all") == (whole, whole)
    transcript = first + " Yes." + second
    assert row(tok, transcript, " An old mirror.", "assistant") == row(tok, TALK, REPLY, "assistant")


def test_chatml_is_taught_its_end_and_not_the_newline_after_it(chatml: Any) -> None:
    start, end = 511, 512
    asked = ids_of(chatml, start, "system\nBe kind.", end, "\n", start, "user\nHello?", end, "\n", start, "assistant\n")
    middle = ids_of(chatml, "\n", start, "user\nWhat does she see?", end, "\n", start, "assistant\n")
    said, last = ids_of(chatml, "Yes.", end), ids_of(chatml, "An old mirror.", end)
    talk = [SYSTEM, *TALK]
    assert row(chatml, talk, REPLY, "completion") == (asked + said + middle + last, last)
    assert row(chatml, talk, REPLY, "assistant") == (asked + said + middle + last, said + last)
    assert Encoder(chatml).prompt(talk) == asked + said + middle


def test_transcripts_become_messages_for_a_template_that_is_not_the_default(chatml: Any) -> None:
    text = "\n\nHuman: Hello?\n\nAssistant: Yes.\n\nHuman: What does she see?\n\nAssistant:"
    assert row(chatml, text, " An old mirror.", "assistant") == row(chatml, TALK, REPLY, "assistant")
    assert Encoder(chatml).prompt(text) == Encoder(chatml).prompt(TALK)
    found = encode.preference(Encoder(chatml), Example(text, " An old mirror.", " No."), LONG)
    assert found["chosen_ids"] == Encoder(chatml).prompt(TALK) + ids_of(chatml, "An old mirror.", 512)
    assert found["rejected_ids"] == Encoder(chatml).prompt(TALK) + ids_of(chatml, "No.", 512)


MARKED = {
    "plain": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '\\n\\nAssistant:' }}"
        "{% generation %}{{ ' ' + m.content }}INSIDE{% endgeneration %}OUTSIDE"
        "{% else %}{{ '\\n\\n' + {'system': 'System', 'user': 'Human'}[m.role] + ': ' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}",
        "{{ eos_token }}",
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}INSIDE{% endgeneration %}OUTSIDE"
        "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "{{ '<|im_end|>\\n' }}",
    ),
}


@pytest.mark.parametrize("kept", ["INSIDE", "OUTSIDE"])
@pytest.mark.parametrize("name", MARKED)
def test_marked_and_unmarked_templates_teach_the_same(tok: Any, name: str, kept: str) -> None:
    """The end of a turn stands inside the markers, or after them: it is taught all the same."""
    templates.put(tok, name)
    unmarked = row(tok, [SYSTEM, *TALK], REPLY, "assistant")
    text, end = MARKED[name]
    tok.chat_template = text.replace(kept, end).replace("INSIDE", "").replace("OUTSIDE", "")
    assert templates.marked(tok.chat_template)
    assert row(tok, [SYSTEM, *TALK], REPLY, "assistant") == unmarked


def test_a_greeting_answers_nothing_and_is_not_taught(tok: Any) -> None:
    greeting = [{"role": "assistant", "content": "Hello."}, *TALK[2:]]
    assert row(tok, greeting, REPLY, "assistant")[1] == ids_of(tok, " An old mirror.", EOS)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3"])
def test_labels_without_markers_are_those_of_trls_marked_twins(tok: Any, name: str) -> None:
    """TRL's training templates are the library of record for which words are the assistant's; where one leaves an end out,
    ours has it."""
    ends = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>", "<|end|>", "<|assistant|>"]
    tok.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ends})
    tok.chat_template = (LIBRARY / f"{name}.jinja").read_text(encoding="utf-8")
    ids, learned = row(tok, TALK, REPLY, "assistant")
    found = tok.apply_chat_template(
        [*TALK, *REPLY],
        chat_template=(LIBRARY / f"{name}_training.jinja").read_text(encoding="utf-8"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert found["input_ids"][: len(ids)] == ids
    theirs = [token for token, own in zip(found["input_ids"], found["assistant_masks"], strict=True) if own]
    newline = ids_of(tok, "\n")
    theirs = [token for token in theirs if [token] != newline]
    assert theirs[: len(learned)] == learned
    assert set(theirs[len(learned) :]) <= {tok.eos_token_id}  # Phi's closes the whole once more: generation has stopped


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "tells the weather"}}]
CALLED: list[Message] = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}],
    },
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "It is dry."},
]


def test_calls_are_taught_and_their_results_are_not(chatml: Any) -> None:
    ask = [{"role": "user", "content": "Rain?"}]
    call = '<tool_call>{"name": "weather", "arguments": {"town": "Ulm"}}</tool_call>'
    ids, learned = row(chatml, ask, CALLED, "completion", TOOLS)
    assert learned == ids_of(chatml, call, 512, "It is dry.", 512)
    assert "tells the weather" in chatml.decode(ids)
    assert "dry<|im_end|>" in chatml.decode(ids)
    prompt = encode.prompt(Encoder(chatml), Example(ask, tools=TOOLS), LONG)["ids"]
    assert ids[: len(prompt)] == prompt


def test_tools_reach_a_template_people_have(tok: Any) -> None:
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.chat_template = (LIBRARY / "qwen2_5.jinja").read_text(encoding="utf-8")
    ids, learned = row(tok, [{"role": "user", "content": "Rain?"}], CALLED, "completion", TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
    assert "tells the weather" in tok.decode(ids)
    assert tok.decode(learned) == f"{call}<|im_end|>It is dry.<|im_end|>"


def test_a_token_across_the_end_of_a_prompt_does_not_change_the_prompt(tok: Any) -> None:
    """`Say:` and `she` may be one word to the tokenizer; the prompt's ids are those that a rollout starts from."""
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    ids, learned = row(
        tok, [{"role": "user", "content": "She se"}], [{"role": "assistant", "content": "es."}], "completion"
    )
    assert ids_of(tok, "She sees.") != ids_of(tok, "She se", "es.")
    assert ids == ids_of(tok, "She se", "es.", EOS)
    assert learned == ids_of(tok, "es.", EOS)


def test_what_cannot_be_labelled_is_skipped(tok: Any) -> None:
    templates.put(tok, "plain")
    with pytest.raises(Skip, match="no such role: judge"):
        row(tok, [{"role": "judge", "content": "?"}], REPLY, "completion")
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(Skip, match="rewrites"):
        row(tok, TALK, REPLY, "completion")
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' or m.content == 'Yes.' %}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(Skip, match="ends with no token"):
        row(tok, TALK[2:], REPLY, "completion")
