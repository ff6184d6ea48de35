"""Reward models from outside the chain: what they are given to read, against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipeline.config.schema import Base
from pipeline.errors import UserError
from pipeline.scoring.classifier import Classifier
from tests.support import tiny

pytestmark = pytest.mark.fast

PROMPTS = ["Anna walks to the garden. What does she see?\n", "Adam comes to the harbour.\n"]
REPLIES = ["Anna sees a tree in the garden.", "The harbour has a boat and a rope, and a lantern."]
CPU = torch.device("cpu")


def decoder(folder: Path, template: str | None = None, labels: int = 1) -> Path:
    """A random Llama classifier with the quickstart's tokenizer."""
    tiny.model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    """A random BERT of 24 positions whose tokenizer separates two texts and has no EOS."""
    words = sorted({word for text in (*PROMPTS, *REPLIES) for word in text.split()})
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    marks = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **marks).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=24, num_labels=1, **shape)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # as initialised it says nearly the same of all texts
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20.0)
    model.save_pretrained(folder)
    return folder


def alone(folder: Path, ids: list[int], **more: list[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]), **{k: torch.tensor([v]) for k, v in more.items()}).logits)


def test_decoder_without_a_template_reads_up_to_eos(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "judge")
    tok = AutoTokenizer.from_pretrained(folder)
    scores = Classifier(Base(model=str(folder), dtype="fp32"), "here", CPU)(PROMPTS, REPLIES)
    for prompt, reply, score in zip(PROMPTS, REPLIES, scores, strict=True):
        ids = [*tok(prompt)["input_ids"], *tok(reply)["input_ids"], tok.eos_token_id]
        assert score == pytest.approx(alone(folder, ids), abs=1e-5)


def test_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    folder = decoder(tmp_path / "judge", template)
    tok = AutoTokenizer.from_pretrained(folder)
    judge = Classifier(Base(model=str(folder), dtype="fp32"), "here", CPU)
    expected = alone(folder, tok(f"<user>{PROMPTS[0]}<assistant>{REPLIES[0]}")["input_ids"])
    conversation = [{"role": "user", "content": PROMPTS[0]}]
    for prompt, reply in ((PROMPTS[0], REPLIES[0]), (conversation, [{"role": "assistant", "content": REPLIES[0]}])):
        assert judge([prompt, PROMPTS[1]], [reply, REPLIES[1]])[0] == pytest.approx(expected, abs=1e-5)


def test_encoder_reads_a_pair(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "judge")
    tok = AutoTokenizer.from_pretrained(folder)
    judge = Classifier(Base(model=str(folder), dtype="fp32"), "here", CPU)
    for prompt, reply, score in zip(PROMPTS, REPLIES, judge(PROMPTS, REPLIES), strict=True):
        pair = tok(prompt, reply)
        expected = alone(folder, pair["input_ids"], token_type_ids=pair["token_type_ids"])
        assert score == pytest.approx(expected, abs=1e-5)
        swapped = tok(reply, prompt)
        assert abs(alone(folder, swapped["input_ids"], token_type_ids=swapped["token_type_ids"]) - expected) > 1e-4


def test_beginning_of_a_long_text_is_cut(tmp_path: Path) -> None:
    """24 positions less three marks: the reply's 7 words leave room for the last 14 of the prompt's."""
    folder = encoder(tmp_path / "judge")
    judge = Classifier(Base(model=str(folder), dtype="fp32"), "here", CPU)
    long = "Adam comes to the " * 8 + "garden. What does"
    short = " ".join(long.split()[-14:])
    assert judge([long], [REPLIES[0]])[0] == pytest.approx(judge([short], [REPLIES[0]])[0], abs=1e-5)


def test_more_than_one_label_is_refused(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "judge", labels=2)
    with pytest.raises(UserError, match="has 2 labels"):
        Classifier(Base(model=str(folder), dtype="fp32"), "recipe r.yaml: stages.select.reward.model", CPU)
