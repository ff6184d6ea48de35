"""Chat templates: the default writes HH-RLHF's text and adds nothing, named ones bring their tokens, all say where a reply
ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from pipeline.data import templates
from pipeline.data.shape import transcript
from pipeline.errors import UserError
from tests.support.tiny import QUICKSTART

pytestmark = pytest.mark.fast

LIBRARY = Path(trl.__file__).parent / "chat_templates"
EOS = 1
TALK = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "What does she see?"},
]


@pytest.fixture
def tok() -> Any:
    """The quickstart's tokenizer: 511 tokens, EOS 1, no BOS, no template of its own."""
    return AutoTokenizer.from_pretrained(QUICKSTART / "base")


def test_the_default_is_hh_rlhf_and_adds_no_tokens(tok: Any) -> None:
    before = len(tok)
    assert templates.put(tok, None) == []
    assert templates.put(tok, "plain") == []
    assert len(tok) == before
    assert templates.added(tok) == []
    assert tok.eos_token == "<eos>"
    assert templates.is_default(tok)
    expected = "\n\nHuman: Hello?\n\nAssistant: Yes.<eos>\n\nHuman: What does she see?\n\nAssistant:"
    assert templates.render(tok, TALK, ask=True) == expected
    assert templates.render(tok, TALK[:2]) == "\n\nHuman: Hello?\n\nAssistant: Yes.<eos>"


def test_a_single_turn_has_the_ids_of_its_transcript(tok: Any) -> None:
    text = "\n\nHuman: What does she see?\n\nAssistant:"
    turns = transcript(text)
    assert turns is not None
    templates.put(tok, "plain")
    asked = tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert asked == tok(text)["input_ids"]


def test_a_tokenizer_that_opens_texts_with_bos_does_so_in_conversations(tok: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tok.add_special_tokens({"bos_token": "<bos>"})
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tok.bos_token_id)]
    )
    text = "\n\nHuman: Hello?\n\nAssistant:"
    templates.put(tok, "plain")
    assert templates.is_default(tok)
    assert tok.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False) == tok(text)["input_ids"]
    assert tok(text)["input_ids"][0] == tok.bos_token_id


def test_chatml_brings_its_tokens_once_and_ends_with_one(tok: Any, tmp_path: Path) -> None:
    assert templates.put(tok, "chatml", ["<|tool|>", "<eos>"]) == ["<|im_start|>", "<|im_end|>", "<|tool|>"]
    assert templates.added(tok) == [511, 512, 513]
    assert tok.eos_token_id == 512
    assert tok.pad_token == "<pad>"
    assert templates.ends(tok) == [512]
    assert not templates.is_default(tok)
    said = templates.render(tok, [{"role": "system", "content": "Be kind."}, *TALK[:2]], ask=True)
    assert said == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>assistant\n"
    )
    tok.save_pretrained(tmp_path)
    later = AutoTokenizer.from_pretrained(tmp_path)
    assert templates.added(later) == [511, 512, 513]
    assert later.chat_template == tok.chat_template
    assert templates.put(later, "chatml") == []
    assert templates.added(later) == []


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_system_tools_calls_and_results_are_written(tok: Any, name: str) -> None:
    templates.put(tok, name)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "description": "tells the weather"}}]
    text = templates.render(tok, talk, tools, ask=True)
    parts = ["Be kind.", "Rain?", '{"name": "weather", "arguments": {"town": "Ulm"}}', "dry"]
    assert [part for part in parts if text.count(part) != 1] == []
    assert "tells the weather" in text
    assert text.endswith({"plain": "\n\nTool: dry\n\nAssistant:", "chatml": "<|im_start|>assistant\n"}[name])


ENDS = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}


@pytest.mark.parametrize(("name", "end"), ENDS.items())
def test_where_a_reply_ends_in_templates_people_have(tok: Any, name: str, end: str) -> None:
    tok.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": [end]})
    tok.chat_template = (LIBRARY / f"{name}.jinja").read_text(encoding="utf-8")
    assert templates.ends(tok)[0] == tok.convert_tokens_to_ids(end)


def test_a_template_that_ends_a_reply_with_no_token_is_refused_naming_both(tok: Any) -> None:
    tok.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n##\\n' }}{% endfor %}"
    with pytest.raises(UserError) as told:
        templates.ends(tok)
    assert "'\\n##\\n'" in str(told.value)
    assert "<eos>" in str(told.value)
    tok.chat_template = "{{ nothing.here.at_all }}"
    with pytest.raises(UserError, match="renders no question"):
        templates.ends(tok)
