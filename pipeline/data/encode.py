"""Text to token ids, the same way in every stage: prompt ids, reply ids, EOS. Right where training and rollout must agree."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from pipeline.data.glue import Item
from pipeline.data.shape import Text
from pipeline.data.split import Part, Split
from pipeline.errors import UserError


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

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def demonstrations(
    encoder: Encoder, split: Split, part: Part, max_length: int, loss_on: str
) -> list[dict[str, list[int]]]:
    """Rows for next-token training: `input_ids` and `labels` (-100 where no loss is taken). Over-long rows are counted."""
    rows = []
    for example in split.part(part):
        prompt, reply = encoder.prompt(example.prompt), encoder.reply(example.chosen or "")
        if len(prompt) + len(reply) > max_length:
            split.leave_out(example, part, "too long")
            continue
        labels = [-100] * len(prompt) if loss_on == "completion" else prompt
        rows.append({"input_ids": prompt + reply, "labels": labels + reply})
    return rows


def preferences(encoder: Encoder, split: Split, part: Part, max_length: int) -> list[dict[str, Any]]:
    """Rows for the pairwise loss: `chosen_ids`, `rejected_ids` and, if every example has one, `margin`."""
    rows: list[dict[str, Any]] = []
    examples = split.part(part)
    margins = bool(examples) and all(example.margin is not None for example in examples)
    for example in examples:
        prompt = encoder.prompt(example.prompt)
        chosen, rejected = prompt + encoder.reply(example.chosen or ""), prompt + encoder.reply(example.rejected or "")
        if max(len(chosen), len(rejected)) > max_length:
            split.leave_out(example, part, "too long")
            continue
        margin = {"margin": example.margin} if margins else {}
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, **margin})
    return rows


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids and the fields of the data row it came from."""

    ids: list[int]
    row: dict[str, Any]


def prompts(encoder: Encoder, split: Split, part: Part, max_length: int) -> list[Prompt]:
    """Prompts of 1 to `max_length` tokens; others are counted, not cut."""
    kept = []
    for example in split.part(part):
        ids = encoder.prompt(example.prompt)
        if 0 < len(ids) <= max_length:
            kept.append(Prompt(ids, example.row))
        else:
            split.leave_out(example, part, "too long" if ids else "empty prompt")
    return kept


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
