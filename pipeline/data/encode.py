"""Text to token ids, the same way in every stage: prompt ids, reply ids, EOS. Right where training and rollout must agree."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass
from typing import Any

from pipeline.data.glue import Item
from pipeline.data.shape import Example, Skip, Text
from pipeline.errors import UserError

TOO_LONG = "too long"


@dataclass(frozen=True)
class Encoder:
    """Encodes with one tokenizer. Prompt and reply are tokenised apart, so that a prompt has the same ids in training, in
    scoring and in a rollout, whatever follows it."""

    tokenizer: Any

    def prompt(self, text: Text) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own opening tokens and without a closing EOS."""
        if isinstance(text, str):
            ids = list(self.tokenizer(text)["input_ids"])
            if not ids and self.tokenizer.bos_token_id is not None:
                return [self.tokenizer.bos_token_id]
            return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        if self.tokenizer.chat_template is None:
            raise UserError(
                "tokenizer",
                "the data holds messages and the tokenizer has no chat template",
                expected="a chat template, or prompts as plain text",
                fix="use the chat model's tokenizer",
            )
        ids = self.tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)

    def reply(self, text: str) -> list[int]:
        """Token ids of a reply, closed by EOS."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    @property
    def identity(self) -> str:
        """A hash of all that decides which ids a text gets."""
        tok = self.tokenizer
        backend = getattr(tok, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else tok.get_vocab()
        for call in ("padding", "truncation") if backend else ():  # left behind by the last call, whatever it was
            rules.pop(call, None)
        parts = [
            type(tok).__name__,
            json.dumps(rules, sort_keys=True),
            str(tok.chat_template),
            str(tok.special_tokens_map),
        ]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def demonstration(encoder: Encoder, example: Example, max_length: int, loss_on: str) -> dict[str, list[int]]:
    """A row for next-token training: `input_ids` and `labels` (-100 where no loss is taken). Raises Skip when too long."""
    prompt, reply = encoder.prompt(example.prompt), encoder.reply(example.chosen or "")
    if len(prompt) + len(reply) > max_length:
        raise Skip(TOO_LONG)
    labels = [-100] * len(prompt) if loss_on == "completion" else prompt
    return {"input_ids": prompt + reply, "labels": labels + reply}


def preference(encoder: Encoder, example: Example, max_length: int) -> dict[str, Any]:
    """A row for the pairwise loss: `chosen_ids`, `rejected_ids` and `margin`, None without one. Raises Skip when too long."""
    prompt = encoder.prompt(example.prompt)
    chosen, rejected = prompt + encoder.reply(example.chosen or ""), prompt + encoder.reply(example.rejected or "")
    if max(len(chosen), len(rejected)) > max_length:
        raise Skip(TOO_LONG)
    return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": example.margin}


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, the fields of the data row it came from, and its source's short name."""

    ids: list[int]
    row: dict[str, Any]
    source: str = ""


def prompt(encoder: Encoder, example: Example, max_length: int) -> dict[str, Any]:
    """A prompt of 1 to `max_length` tokens: `ids`, and `row`, its data row in JSON. Raises Skip for others: none is cut."""
    ids = encoder.prompt(example.prompt)
    if not 0 < len(ids) <= max_length:
        raise Skip(TOO_LONG if ids else "empty prompt")
    return {"ids": ids, "row": json.dumps(example.row, ensure_ascii=False, default=str)}


def candidate(encoder: Encoder, example: Example, max_length: int, max_prompt: int | None) -> dict[str, Any]:
    """A row to choose or not: `prompt_ids`, `reply_ids` with its EOS, and in JSON `said` (prompt and reply as they stand in the
    data), `row` and `origin`. Raises Skip when the two are above `max_length` tokens, or when the prompt, which a model is to
    answer unless `max_prompt` is None, is longer than that or empty."""
    prompt, reply = encoder.prompt(example.prompt), encoder.reply(example.chosen or "")
    if len(prompt) + len(reply) > max_length or (max_prompt is not None and len(prompt) > max_prompt):
        raise Skip(TOO_LONG)
    if max_prompt is not None and not prompt:
        raise Skip("empty prompt")
    texts = {"said": [example.prompt, example.chosen], "row": example.row, "origin": example.origin}
    return {"prompt_ids": prompt, "reply_ids": reply} | {
        name: json.dumps(value, default=str) for name, value in texts.items()
    }


class Classified:
    """Rows for a sequence classifier, put together when they are read: `input_ids` closed by EOS, where the head reads,
    `attention_mask` and `labels` (int for a class, float for regression).

    Each distinct piece of text is encoded and held once: many candidates may share a long passage. A row above
    `max_length` tokens loses the end of its longest pieces; `cut` counts such rows. `longest` is the tokens of the longest.
    """

    def __init__(self, tokenizer: Any, items: list[Item], max_length: int, *, classes: bool) -> None:
        self.items, self.classes, self.eos = items, classes, tokenizer.eos_token_id
        opening = list(tokenizer("")["input_ids"])
        self.opening = opening[:-1] if opening and opening[-1] == self.eos else opening
        self.room = max_length - len(self.opening) - 1
        distinct = list(dict.fromkeys(piece for item in items for piece in item.pieces))
        encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
        self.ids = {text: array("i", ids) for text, ids in zip(distinct, encoded, strict=True)}
        tokens = [sum(len(self.ids[piece]) for piece in item.pieces) for item in items]
        self.cut = sum(count > self.room for count in tokens)
        self.longest = min(max(tokens, default=0), self.room) + len(self.opening) + 1

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = self.items[number]
        pieces = [self.ids[piece] for piece in item.pieces]
        ids = [*self.opening]
        for piece, length in zip(pieces, shares([len(piece) for piece in pieces], self.room), strict=True):
            ids += piece[:length]
        ids.append(self.eos)
        label = int(item.label) if self.classes else item.label
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}


def shares(lengths: list[int], room: int) -> list[int]:
    """How much of each text is kept so that all fit into `room`: the longest are cut to one length, short ones stay whole."""
    kept, left = list(lengths), max(room, 0)
    for place, number in enumerate(sorted(range(len(lengths)), key=lambda n: lengths[n])):
        kept[number] = min(lengths[number], left // (len(lengths) - place))
        left -= kept[number]
    return kept
