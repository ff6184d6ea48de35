"""Rows of pairs and of labelled replies: plain text and conversations, their EOS, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.data import templates
from pipeline.data.encode import Encoder, labelled, pair
from pipeline.data.shape import Example, Skip
from tests.support.tiny import QUICKSTART

pytestmark = pytest.mark.fast

QUESTION, GOOD, BAD = "What does she see?\n", "She sees a lamp.", "Nothing."


@pytest.fixture
def tok() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / "base")


def test_text_is_closed_by_eos(tok: Any) -> None:
    prompt, good, bad = (tok(text, add_special_tokens=False)["input_ids"] for text in (QUESTION, GOOD, BAD))
    row = pair(Encoder(tok), Example(QUESTION, GOOD, BAD), 64)
    assert row == {"prompt_ids": prompt, "chosen_ids": [*good, 1], "rejected_ids": [*bad, 1]}
    row = labelled(Encoder(tok), Example(QUESTION, BAD, label=False), 64)
    assert row == {"prompt_ids": prompt, "completion_ids": [*bad, 1], "label": False}


def test_conversations_go_through_the_template(tok: Any) -> None:
    templates.put(tok, "chatml")
    asked = [{"role": "user", "content": QUESTION}]
    example = Example(asked, *([{"role": "assistant", "content": text}] for text in (GOOD, BAD)))
    row = pair(Encoder(tok), example, 64)
    assert row["prompt_ids"] == tok.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert tok.decode(row["chosen_ids"]) == GOOD + "<|im_end|>"
    assert tok.decode(row["rejected_ids"]) == BAD + "<|im_end|>"


@pytest.mark.parametrize(("prompt", "length", "reason"), [("", 64, "empty prompt"), (QUESTION, 8, "too long")])
def test_left_out(tok: Any, prompt: str, length: int, reason: str) -> None:
    for encode in (pair, labelled):
        with pytest.raises(Skip, match=reason):
            encode(Encoder(tok), Example(prompt, GOOD, BAD, label=True), length)
