"""The models that answer: one or two stages, on one copy of their base where they share it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from pipeline import engine, handoff
from pipeline.adapters import build
from pipeline.config.recipe import BASE
from pipeline.config.schema import Base, Sampling
from pipeline.data.encode import Encoder
from pipeline.data.shape import Message
from pipeline.export.model import held
from pipeline.generation import hf
from pipeline.generation.rollout import keys
from pipeline.handoff import Baton
from pipeline.model import load
from pipeline.model.assemble import add_adapter
from pipeline.model.roles import Role, Roles
from pipeline.published import open_model

Asked = str | list[Message]
"""A text to go on with, or a conversation that the assistant is to answer."""


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. Answer number n of a session takes its noise from `seed` and n, greedy ones none."""

    sampling: Sampling
    seed: int
    greedy: bool

    def noise(self, numbers: list[int], device: torch.device) -> torch.Tensor | None:
        if self.greedy:
            return None
        asked = torch.tensor(numbers, device=device)
        return keys(self.seed, 0, asked, torch.zeros_like(asked))


@dataclass(frozen=True)
class Voice:
    """What a speaker is made of: a base, of which content, and the adapter on it, if any."""

    name: str
    base: Base
    content: tuple[str, str | None]
    adapter: Path | None
    tokenizer: Path


def new_lines(typed: str) -> str:
    """A line as it was typed, with new lines where it has \\n."""
    return typed.replace("\\n", "\n")


Tell = Callable[[str], None]


class Stopped(Exception):
    """An answer was ended before its end."""


class Full(Exception):
    """A conversation that leaves no room for an answer; `tokens` of it, `limit` in all."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(f"{tokens} tokens, and the model's context holds {limit}")


class Speaker:
    """One model that answers. It may share its weights with another one: one of them answers at a time."""

    def __init__(self, name: str, roles: Roles, role: str, tok: Any) -> None:
        self.name, self.roles, self.role, self.encoder = name, roles, role, Encoder(tok)
        model = roles.causal_lm(role)
        self.eos, self.device = load.eos_ids(model), model.device
        self.limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def ids(self, asked: Asked, room: int) -> list[int]:
        """Token ids of what is asked. Raises Full where an answer of `room` tokens does not fit behind them."""
        found = self.encoder.prompt(asked)
        whole = len(found) + len(self.roles.virtual(self.role))
        if self.limit is not None and whole + room > self.limit:
            raise Full(whole, self.limit)
        return found

    def stream(self, asked: Asked, settings: Settings, number: int, tell: Tell, stopped: Callable[[], bool]) -> None:
        """Answer; `tell` is given the pieces of text as they come. The answer ends early once `stopped` says so."""
        prompt, before = self.ids(asked, 1), self.roles.virtual(self.role)
        longest = settings.sampling.max_response_length
        if self.limit is not None:
            longest = min(longest, self.limit - len(before) - len(prompt))
        pieces = Pieces(self.encoder.tokenizer, tell, stopped)
        try:
            with self.roles.evaluating():
                hf.sample(
                    self.roles.causal_lm(self.role),
                    [before + prompt],
                    settings.noise([number], self.device),
                    settings.sampling.model_copy(update={"max_response_length": longest}),
                    pad=self.encoder.tokenizer.pad_token_id,
                    eos=self.eos,
                    streamer=pieces,
                )
        except Stopped:
            pieces.end()

    def answers(self, asked: list[Asked], settings: Settings, first: int) -> list[str]:
        """An answer for each; the noise is that of the answers `first`, `first + 1` and so on of a session."""
        prompts = [self.ids(one, settings.sampling.max_response_length) for one in asked]
        noise = settings.noise(list(range(first, first + len(asked))), self.device)
        pad = self.encoder.tokenizer.pad_token_id
        with self.roles.evaluating():
            rollout = self.roles.rollout(
                self.role, prompts, noise, settings.sampling, pad=pad, eos=self.eos, synced=False
            )
        return [self.encoder.text(rollout.response(row)) for row in range(len(prompts))]


class Pieces(TextStreamer):
    """Hands on an answer's text as soon as it is sure how its tokens read. Raises Stopped, between two tokens, once `stopped`
    says so."""

    def __init__(self, tok: Any, tell: Tell, stopped: Callable[[], bool]) -> None:
        super().__init__(tok, skip_prompt=True, skip_special_tokens=True)
        self._tell, self._stopped = tell, stopped

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self._stopped():
            raise Stopped

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._tell(text)


def speakers(folder: Path, first: Baton, other: str | None, kinds: frozenset[str]) -> list[Speaker]:
    """The speaker of `first`, and beside it that of stage `other` of the same run, or of the base below `first`."""
    engine.quiet()
    voices = [_voice(first)]
    if other == BASE:
        voices.append(_below(first))
    elif other is not None:
        voices.append(_voice(open_model(folder, other, kinds)))
    toks = [load.tokenizer(str(voice.tokenizer), trust=voice.base.trust_remote_code) for voice in voices]
    trunks: list[Any] = []
    if len(voices) > 1 and not _shares(*voices):
        names = " and ".join(voice.name for voice in voices)
        print(f"{names} share no base, or have adapters of two kinds: both are loaded whole", file=sys.stderr)
    for voice, tok in zip(voices, toks, strict=True):
        shared = bool(trunks) and _shares(*voices)
        trunk = trunks[0] if shared else load.causal(voice.base, tok, sharded=False)
        if voice.adapter is not None:
            adapter = (build.frozen(voice.adapter), build.read(voice.adapter)[0])
            trunk = add_adapter(trunk, f"speaker{voices.index(voice)}", *adapter)
        if shared:
            trunks[0] = trunk
        trunks.append(trunk)
    return _on_device(voices, trunks, toks)


def _on_device(voices: list[Voice], trunks: list[Any], toks: list[Any]) -> list[Speaker]:
    number = {id(trunk): str(place) for place, trunk in reversed(list(enumerate(trunks)))}
    roles = {
        f"speaker{place}": Role(number[id(trunk)], f"speaker{place}" if voice.adapter else None, trained=False)
        for place, (voice, trunk) in enumerate(zip(voices, trunks, strict=True))
    }
    together = Roles({number[id(trunk)]: trunk for trunk in trunks}, {}, roles)
    if torch.cuda.is_available():
        together.to("cuda")
    return [Speaker(voice.name, together, role, tok) for voice, role, tok in zip(voices, roles, toks, strict=True)]


def _shares(first: Voice, second: Voice) -> bool:
    """Whether both stand on the same weights with adapters that PEFT puts on one model."""
    if first.content != second.content:
        return False
    kinds = {build.frozen(voice.adapter).peft_type for voice in (first, second) if voice.adapter is not None}
    return len(kinds) <= 1


def _voice(baton: Baton) -> Voice:
    if not baton.is_adapter:
        base = held(baton).model_copy(update={"model": str(baton.path), "revision": None, "quantization": None})
        content = (handoff.model_hash(str(baton.path)), None)
        return Voice(baton.manifest["stage"], base, content, None, baton.path)
    record = baton.manifest["base"]
    base = held(baton).model_copy(update={key: record[key] for key in ("model", "revision", "quantization")})
    content = (record["content_hash"], record["quantization"])
    return Voice(baton.manifest["stage"], base, content, baton.path, baton.path)


def _below(baton: Baton) -> Voice:
    """What `baton` was trained on, with its tokenizer."""
    record = baton.manifest["base"]
    base = held(baton).model_copy(update={key: record[key] for key in ("model", "revision", "quantization")})
    return Voice(BASE, base, (record["content_hash"], record["quantization"]), None, baton.path)
