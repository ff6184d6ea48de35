"""The models a selection asks: one that scores replies, one that replies itself, one whose states say how rows differ."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from pipeline.config.recipe import BASE
from pipeline.config.schema import Base
from pipeline.config.selection import Selection
from pipeline.data.encode import Encoder
from pipeline.generation.rollout import keys
from pipeline.handoff import Baton
from pipeline.model.assemble import assemble, plain, scoring, speaking
from pipeline.model.load import eos_ids
from pipeline.model.roles import Roles
from pipeline.scoring.classifier import from_outside
from pipeline.stage import Context
from stages.selection.phases import Read

JUDGE, ANSWERS, STATES = "judging", "answering", "reading"
"""The models' roles. PEFT looks for an adapter's name in the names of parameters: none of them may be part of one."""


class Models:
    """The models of a selection, whole on every rank, those on one base sharing it."""

    def __init__(self, context: Context, block: Selection, tok: Any, rows: Dataset, device: torch.device) -> None:
        self.block, self.rows, self.device = block, rows, device
        self.encoder, self.pad = Encoder(tok), int(tok.pad_token_id)
        parts = {STATES: speaking(context, _baton(context, block.coverage.embedding))}
        if block.necessity is not None:
            parts[ANSWERS] = speaking(context, _baton(context, block.necessity.model))
        outside = block.reward if block.reward is not None and block.reward.model is not None else None
        if block.reward is not None and block.reward.stage is not None:
            parts[JUDGE] = scoring(context.batons[block.reward.stage], block.base)
        self.roles: Roles = assemble(context, parts, tok, sharded=False).to(device)
        self.base: Base = parts[STATES].base
        where = context.recipe.where("stages", context.stage, "reward", "model")
        self.outside = from_outside(context.recipe, outside, where, device) if outside is not None else None

    def quality(self, picked: list[int]) -> Read:
        """The score of each row's reply, float32 [rows]."""
        rows = [self.rows[number] for number in picked]
        if self.outside is not None:
            said = [json.loads(row["said"]) for row in rows]
            return Read(torch.tensor(self.outside([prompt for prompt, _ in said], [reply for _, reply in said])))
        return Read(self._scores([row["prompt_ids"] + row["reply_ids"] for row in rows]))

    def necessity(self, picked: list[int]) -> Read:
        """The score of the model's own reply to each row's prompt, float32 [rows], and the replies."""
        rows = [self.rows[number] for number in picked]
        model, numbers = plain(self.roles.trunks[self.roles.roles[ANSWERS].trunk]), torch.tensor(picked)
        with self.roles.evaluating():
            rollout = self.roles(
                "rollout",
                ANSWERS,
                [row["prompt_ids"] for row in rows],
                keys(self.block.seed, 0, numbers, torch.zeros_like(numbers)).to(self.device),
                self.block.sampling,
                pad=self.pad,
                eos=eos_ids(model),
                synced=False,
            )
        replies = [rollout.response(row) for row in range(len(picked))]
        texts = [self.encoder.text(reply) for reply in replies]
        if self.outside is not None:
            return Read(torch.tensor(self.outside([json.loads(row["said"])[0] for row in rows], list(texts))), texts)
        return Read(self._scores([row["prompt_ids"] + ids for row, ids in zip(rows, replies, strict=True)]), texts)

    def states(self, picked: list[int]) -> Read:
        """The mean of the last hidden states over each row's prompt and reply, float32 [rows, width]."""
        rows = [self.rows[number] for number in picked]
        tokens, lengths = self._padded([row["prompt_ids"] + row["reply_ids"] for row in rows])
        with self.roles.evaluating():
            return Read(self.roles("embeddings", STATES, tokens, lengths).cpu())

    def _scores(self, texts: list[list[int]]) -> Tensor:
        with self.roles.evaluating():
            found: Tensor = self.roles("scores", JUDGE, *self._padded(texts))
        return found.cpu()

    def _padded(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(token ids padded on the right, int64 [B, L]; lengths, int64 [B])."""
        lengths = [len(text) for text in texts]
        tokens = [text + [self.pad] * (max(lengths) - len(text)) for text in texts]
        return torch.tensor(tokens, device=self.device), torch.tensor(lengths, device=self.device)


def first_baton(context: Context, block: Selection) -> Baton | None:
    """A stage of the chain whose tokenizer is the models'; None when all of them are the base or come from outside."""
    named = [block.necessity.model if block.necessity else BASE, block.coverage.embedding]
    named.append((block.reward.stage if block.reward else None) or BASE)
    return next((baton for name in named if (baton := _baton(context, name)) is not None), None)


def _baton(context: Context, name: str) -> Baton | None:
    return None if name == BASE else context.batons[name]
