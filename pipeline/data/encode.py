"""Text to token ids, the same way in every stage: prompt ids, reply ids, EOS. Right where training and rollout must agree."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

from pipeline.data import templates
from pipeline.data.glue import Item
from pipeline.data.shape import Example, Message, Skip, Text, transcript
from pipeline.data.templates import marked

TOO_LONG = "too long"
REWRITTEN = "the chat template rewrites what stands before a reply"
ENDLESS = "a turn of the assistant's ends with no token that generation stops on"


@dataclass(frozen=True)
class Encoder:
    """Encodes with one tokenizer. A prompt has the same ids in training, in scoring and in a rollout, whatever follows it.

    Text stays text: a reply is tokenised apart from its prompt and closed by EOS. Messages go through the chat template, and
    so do HH-RLHF's transcripts where the tokenizer's template is not the default, which writes the same words. A reply ends
    at the token that ends the assistant's turn, without what the template writes after it.
    """

    tokenizer: Any

    def prompt(self, text: Text, tools: list[Any] | None = None) -> list[int]:
        """Token ids of a prompt, with its opening tokens and without a closing EOS."""
        turns = self._turns(text)
        if turns is not None:
            return self._ids(self._render(turns, tools, ask=True))
        ids = list(self.tokenizer(text)["input_ids"])
        if not ids and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def reply(self, text: str) -> list[int]:
        """Token ids of a reply that is text to a prompt that is text, closed by EOS."""
        return [*self._ids(text), self.tokenizer.eos_token_id]

    def pair(self, prompt: Text, reply: Text, tools: list[Any] | None = None) -> tuple[list[int], list[bool]]:
        """Token ids of a prompt and its reply, and which of them are the assistant's in the reply: its words and the token
        that ends its turn. Raises Skip where the template does not tell."""
        turns = self._turns(prompt, said=reply)
        if turns is None:
            asked, said = self.prompt(prompt), self.reply(str(reply))
            return asked + said, [False] * len(asked) + [True] * len(said)
        return self._taught([*turns, *_messages(reply)], len(turns), tools)

    def conversation(self, prompt: Text, reply: Text, tools: list[Any] | None = None) -> tuple[list[int], list[bool]]:
        """As `pair`, and the assistant's turns in the prompt are its own too."""
        turns = self._turns(prompt, said=reply)
        if turns is None:
            found = transcript(str(prompt))
            if found is None:
                return self.pair(prompt, reply)
            turns = found
        whole = [*turns, *_messages(reply)]
        if marked(self._template(tools)) and whole[0]["role"] != "assistant":
            return self._marked(whole, tools)
        return self._taught(whole, 0, tools)

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

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a turn of the assistant's."""
        return frozenset([self.tokenizer.eos_token_id, *templates.ends(self.tokenizer)])

    def _template(self, tools: list[Any] | None) -> str:
        tok = self.tokenizer
        return templates.default(tok) if tok.chat_template is None else str(tok.get_chat_template(tools=tools))

    def _turns(self, prompt: Text, said: Text = "") -> list[Message] | None:
        """A prompt as messages; None where it is text and stays text."""
        if not isinstance(prompt, str):
            return prompt
        found = None if templates.is_default(self.tokenizer) else transcript(prompt)
        if found is None and not isinstance(said, str):
            return [{"role": "user", "content": prompt}] if prompt else []
        return found

    def _render(self, messages: list[Message], tools: list[Any] | None, *, ask: bool = False) -> str:
        try:
            return templates.render(self.tokenizer, messages, tools, ask=ask)
        except templates.ERRORS as error:
            raise Skip(f"the chat template refuses it: {templates.told(error)}") from None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _taught(self, messages: list[Message], first: int, tools: list[Any] | None) -> tuple[list[int], list[bool]]:
        """(token ids, which of them are the assistant's in its turns from message `first` on), up to the last of these.

        A turn is what the template adds to the conversation before it, asked for the assistant's words, up to the first token
        at which generation stops.
        """
        whole, cuts = self._render(messages, tools), []
        for place, message in enumerate(messages):
            if place < max(first, 1) or message["role"] != "assistant":
                continue  # the others', or a greeting that answers nothing
            asked = self._render(messages[:place], tools, ask=True)
            said = self._render(messages[: place + 1], tools)
            if not said.startswith(asked):
                raise Skip(REWRITTEN)
            end = self._end(said, len(asked))
            if not whole.startswith(said[:end]):
                raise Skip(REWRITTEN)
            cuts += [len(asked), end]
        return self._ended([(piece, bool(number % 2)) for number, piece in enumerate(self._pieces(whole, cuts))])

    def _end(self, text: str, start: int) -> int:
        """Where the first token at which generation stops is over, from `start` on."""
        texts = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.ends]
        found = [(place, place + len(end)) for end in texts if (place := text.find(end, start)) >= 0]
        if not found:
            raise Skip(ENDLESS)
        return min(found)[1]

    def _pieces(self, text: str, cuts: list[int]) -> Iterator[list[int]]:
        """Token ids of the text up to each cut. They are those of the whole text, unless a token lies across a cut: then
        the rest is tokenised apart, as after a prompt in a rollout."""
        before: list[int] = []
        start = 0
        for end in cuts:
            whole = self._ids(text[:end])
            joined = whole[: len(before)] == before
            piece = whole[len(before) :] if joined else self._ids(text[start:end])
            before, start = before + piece, end
            yield piece

    def _marked(self, messages: list[Message], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
        """The same from a template that marks the assistant's words. Where the end of a turn is not among them it is added:
        a model that is not taught to end does not."""
        try:
            found = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except templates.ERRORS as error:
            raise Skip(f"the chat template refuses it: {templates.told(error)}") from None
        ids, mask = list(found["input_ids"]), [bool(own) for own in found["assistant_masks"]]
        for place in range(1, len(ids)):
            mask[place] |= mask[place - 1] and ids[place - 1] not in self.ends and ids[place] in self.ends
        return self._ended(
            [([i for i, _ in run], own) for own, run in groupby(zip(ids, mask, strict=True), itemgetter(1))]
        )

    def _ended(self, pieces: list[tuple[list[int], bool]]) -> tuple[list[int], list[bool]]:
        """Pieces of a conversation, each the assistant's or not, as one; a turn of its own goes up to the token that ends it.
        What follows the last is left out."""
        ids: list[int] = []
        taught: list[bool] = []
        for piece, own in pieces:
            end = next((place for place, token in enumerate(piece) if token in self.ends), -1) if own else -1
            if own and end < 0:
                raise Skip(ENDLESS)
            ids += piece
            taught += [place <= end for place in range(len(piece))]
        if True not in taught:
            raise Skip("no turn of the assistant's")
        length = len(taught) - taught[::-1].index(True)
        return ids[:length], taught[:length]


def _messages(reply: Text) -> list[Message]:
    return [{"role": "assistant", "content": reply.strip()}] if isinstance(reply, str) else reply


def demonstration(encoder: Encoder, example: Example, max_length: int, loss_on: str) -> dict[str, list[int]]:
    """A row for next-token training: `input_ids` and `labels` (-100 where no loss is taken). Raises Skip when too long.

    `loss_on` is `completion` (the reply), `assistant` (all of the assistant's turns) or `all`.
    """
    encode = encoder.conversation if loss_on == "assistant" else encoder.pair
    ids, taught = encode(example.prompt, example.chosen or "", example.tools)
    if len(ids) > max_length:
        raise Skip(TOO_LONG)
    labels = [token if own or loss_on == "all" else -100 for token, own in zip(ids, taught, strict=True)]
    return {"input_ids": ids, "labels": labels}


def answered(
    encoder: Encoder, example: Example, max_length: int, max_prompt: int | None, *, replies: bool
) -> dict[str, list[int]]:
    """A row as `demonstration` makes it, of which a prompt above `max_prompt` tokens is too long to be replied to, unless that
    is None. A row without a reply is its prompt alone, all of its labels -100. Raises Skip for that where `replies` are
    needed."""
    if example.chosen is None:
        if replies:
            raise Skip("no reply")
        ids = encoder.prompt(example.prompt)
        row = {"input_ids": ids, "labels": [-100] * len(ids)}
    else:
        row = demonstration(encoder, example, max_length, "completion")
    prompt = prompt_length(row["labels"])
    if max_prompt is not None and not 0 < prompt <= max_prompt:
        raise Skip(TOO_LONG if prompt else "empty prompt")
    return row


def prompt_length(labels: list[int]) -> int:
    """How many tokens stand before the first that a loss is taken of."""
    return next((place for place, label in enumerate(labels) if label != -100), len(labels))


def document(encoder: Encoder, example: Example) -> dict[str, list[int]]:
    """A text, however long: `input_ids`, with the tokenizer's opening tokens and a closing EOS."""
    return {"input_ids": encoder.prompt("") + encoder.reply(str(example.chosen))}


def preference(encoder: Encoder, example: Example, max_length: int) -> dict[str, Any]:
    """A row for the pairwise loss: `chosen_ids`, `rejected_ids` and `margin`, None without one. Raises Skip when too long."""
    chosen, _ = encoder.pair(example.prompt, example.chosen or "", example.tools)
    rejected, _ = encoder.pair(example.prompt, example.rejected or "", example.tools)
    if max(len(chosen), len(rejected)) > max_length:
        raise Skip(TOO_LONG)
    return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": example.margin}


def compared(encoder: Encoder, example: Example, max_length: int) -> dict[str, Any]:
    """A row to be scored: `chosen_ids` and `rejected_ids` as for the pairwise loss, and in JSON `said`: prompt, chosen and
    rejected reply as they stand in the data. Raises Skip when too long."""
    row = preference(encoder, example, max_length)
    said = json.dumps([example.prompt, example.chosen, example.rejected], ensure_ascii=False, default=str)
    return {"chosen_ids": row["chosen_ids"], "rejected_ids": row["rejected_ids"], "said": said}


def pair(encoder: Encoder, example: Example, max_length: int) -> dict[str, list[int]]:
    """A row for losses of pairs: `prompt_ids`, and `chosen_ids` and `rejected_ids` with their EOS. Raises Skip when the prompt
    is empty or, with the longer reply, above `max_length` tokens."""
    prompt, chosen = _apart(encoder, example, example.chosen or "", max_length)
    _, rejected = _apart(encoder, example, example.rejected or "", max_length)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def labelled(encoder: Encoder, example: Example, max_length: int) -> dict[str, Any]:
    """A row for losses of single replies: `prompt_ids`, `completion_ids` with EOS, and its `label`. Raises Skip as `pair`."""
    prompt, reply = _apart(encoder, example, example.chosen or "", max_length)
    return {"prompt_ids": prompt, "completion_ids": reply, "label": bool(example.label)}


def _apart(encoder: Encoder, example: Example, reply: Text, max_length: int) -> tuple[list[int], list[int]]:
    """(ids of the example's prompt, ids of a reply to it). A reply's first token is predicted from the prompt's last."""
    ids, own = encoder.pair(example.prompt, reply, example.tools)
    prompt = own.index(True)
    if not prompt:
        raise Skip("empty prompt")
    if len(ids) > max_length:
        raise Skip(TOO_LONG)
    return ids[:prompt], ids[prompt:]


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, the fields of the data row it came from, and its source's short name."""

    ids: list[int]
    row: dict[str, Any]
    source: str = ""


def prompt(encoder: Encoder, example: Example, max_length: int) -> dict[str, Any]:
    """A prompt of 1 to `max_length` tokens: `ids`, and `row`, its data row in JSON. Raises Skip for others: none is cut."""
    ids = encoder.prompt(example.prompt, example.tools)
    if not 0 < len(ids) <= max_length:
        raise Skip(TOO_LONG if ids else "empty prompt")
    return {"ids": ids, "row": json.dumps(example.row, ensure_ascii=False, default=str)}


def candidate(encoder: Encoder, example: Example, max_length: int, max_prompt: int | None) -> dict[str, Any]:
    """A row to choose or not: `prompt_ids`, `reply_ids` with its EOS, and in JSON `said` (prompt and reply as they stand in the
    data), `row` and `origin`. Raises Skip when the two are above `max_length` tokens, or when the prompt, which a model is to
    answer unless `max_prompt` is None, is longer than that or empty."""
    prompt = encoder.prompt(example.prompt, example.tools)
    reply = encoder.pair(example.prompt, example.chosen or "", example.tools)[0][len(prompt) :]
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
