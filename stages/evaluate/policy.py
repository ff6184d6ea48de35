"""Replies of one policy beside those of another on held-out prompts, scored by reward models and by a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.config.evaluate import ChatJudge, Evaluate, Policy
from pipeline.config.recipe import digest
from pipeline.config.schema import FunctionReward
from pipeline.data import encode, encoded
from pipeline.errors import UserError
from pipeline.generation.rollout import Rollout, keys
from pipeline.model import begin
from pipeline.model.assemble import assemble, plain, scoring
from pipeline.model.load import eos_ids
from pipeline.scoring.chat import Answer, Chat
from pipeline.scoring.classifier import from_outside
from pipeline.scoring.source import build, checked
from pipeline.stage import Context
from stages.evaluate import kept, subject
from stages.evaluate.comparison import Record, by_source, compared, side_by_side, summary, verdicts
from stages.evaluate.results import Results

SAMPLES = "samples.jsonl"
TESTED, AGAINST = "tested", "against"
"""The two policies' roles. PEFT looks for an adapter's name in the names of parameters, most of which say `model`."""


def compare(context: Context, block: Evaluate, device: torch.device) -> Results:
    """Both policies' replies to the first `rows` held-out prompts, side by side. Raises UserError when there is none."""
    where = context.recipe.where("stages", context.stage, "judge")
    judge = build(FunctionReward(function=block.judge), where) if block.judge else None
    chat = chat_judge(context, block.chat_judge) if block.chat_judge else None

    policies = cast(tuple[Policy, Policy], (block.model, block.against))
    first, second = (subject.baton(context, policy) for policy in policies)
    tok = begin.tokenizer(context, first or second)
    _, held_out, counts = encoded.prompts(context, tok, block.sampling.max_prompt_length)
    prompts: list[encode.Prompt] = held_out[: block.rows]
    if not prompts:
        raise UserError(
            context.recipe.where("stages", context.stage, "prompts"),
            "no held-out prompt",
            expected="at least one",
            fix="raise data.holdout or max_prompt_length",
        )

    speakers = Speakers(context, block, policies, tok, prompts, device)
    sides = {"model": speakers.answers(TESTED), "against": speakers.answers(AGAINST)}
    origins = [prompt.source for prompt in prompts]
    judged = {
        f"score/{s.name}": {side: [r["scores"][s.name] for r in sides[side]] for side in sides} for s in block.reward
    }
    if judge is not None:
        rows = [prompt.row for prompt in prompts]
        judged["judge"] = {
            side: checked(judge, [r["prompt"] for r in records], [r["reply"] for r in records], rows)
            for side, records in sides.items()
        }
    table, metrics = side_by_side(sides, judged), summary(sides)
    longer = [float(m["length"] - a["length"]) for m, a in zip(sides["model"], sides["against"], strict=True)]
    for name, scores in judged.items():
        metrics |= compared(name, scores["model"], scores["against"], longer, block.seed)
        metrics |= by_source(name, scores["model"], scores["against"], origins)
    if chat is not None:
        answers = asked(context, block, chat, sides)
        metrics |= verdicts(answers, longer, block.seed)
        for row, answer in zip(table, answers, strict=True):
            row["chat_judge"] = answer
    read = {"": counts}
    if block.chat_judge and block.chat_judge.prompt:
        read["chat_judge"] = {block.chat_judge.prompt: Counter()}
    return Results(metrics, {SAMPLES: table}, read)


class Speakers:
    """The two policies and the reward models, those on one base sharing it."""

    def __init__(
        self,
        context: Context,
        block: Evaluate,
        policies: Sequence[Policy],
        tok: Any,
        prompts: list[encode.Prompt],
        device: torch.device,
    ) -> None:
        self.context, self.block, self.prompts = context, block, prompts
        self.encoder = encode.Encoder(tok)
        parts = {
            role: subject.part(context, policy, tok) for role, policy in zip((TESTED, AGAINST), policies, strict=True)
        }
        self.rewards = {f"reward{i}": s for i, s in enumerate(block.reward) if s.stage is not None}
        parts |= {role: scoring(context.batons[str(s.stage)], block.base) for role, s in self.rewards.items()}
        self.roles = assemble(context, parts, tok, sharded=False).to(device)
        self.outside = {
            s.name: from_outside(
                context.recipe, s, context.recipe.where("stages", context.stage, f"reward.{i}"), device
            )
            for i, s in enumerate(block.reward)
            if s.model is not None
        }
        self.key = {
            "policies": [subject.identity(context, policy) for policy in policies],
            "rewards": [subject.judge_identity(context, scorer) for scorer in block.reward],
            "prompts": [prompt.ids for prompt in prompts],
            "sampling": block.sampling.model_dump(),
            "seed": block.seed,
        }

    def answers(self, role: str) -> list[Record]:
        """One record per prompt of what `role` replies, in order."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        key = {**self.key, "answers": role}
        return kept.measure(self.context, key, lengths, self.block.micro_batch, lambda rows: self.reply(role, rows))

    def reply(self, role: str, picked: list[int]) -> list[Record]:
        model, numbers = plain(self.roles.trunks[self.roles.roles[role].trunk]), torch.tensor(picked)
        noise = keys(self.block.seed, 0, numbers, torch.zeros_like(numbers)).to(model.device)
        asked = [self.prompts[i].ids for i in picked]
        pad, eos = self.encoder.tokenizer.pad_token_id, eos_ids(model)
        with self.roles.evaluating():
            rollout = self.roles("rollout", role, asked, noise, self.block.sampling, pad=pad, eos=eos, synced=False)
            return self.describe(rollout)

    def describe(self, rollout: Rollout) -> list[Record]:
        """One record per reply: texts, scores of every reward model, KL of the tested policy to the other in nats, length."""
        temperature = self.block.sampling.temperature
        asked = (rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.logprobs.shape[1], temperature)
        said, _ = self.roles("log_probs", TESTED, *asked)
        other, _ = self.roles("log_probs", AGAINST, *asked)
        kl = (said - other).sum(1)
        lengths = rollout.prompt_lengths + rollout.lengths
        scores = {s.name: self.roles("scores", role, rollout.tokens, lengths) for role, s in self.rewards.items()}
        records: list[Record] = [
            {
                "prompt": self.encoder.text(rollout.tokens[row, : int(rollout.prompt_lengths[row])].tolist()),
                "reply": self.encoder.text(rollout.response(row)),
                "kl": float(kl[row]),
                "tokens": rollout.response(row)[: int(rollout.lengths[row]) - int(rollout.ended[row])],
                "length": int(rollout.lengths[row]),
                "ended": bool(rollout.ended[row]),
                "scores": {name: float(value[row]) for name, value in scores.items()},
            }
            for row in range(len(rollout.lengths))
        ]
        for name, classifier in self.outside.items():
            found = classifier([r["prompt"] for r in records], [r["reply"] for r in records])
            for record, value in zip(records, found, strict=True):
                record["scores"][name] = value
        return records


def chat_judge(context: Context, block: ChatJudge) -> Chat:
    where = context.recipe.where("stages", context.stage, "chat_judge")
    return Chat(block, where, Path(context.recipe.local(block.prompt)) if block.prompt else None)


def asked(context: Context, block: Evaluate, chat: Chat, sides: dict[str, list[Record]]) -> list[tuple[Answer, Answer]]:
    """The chat judge's two answers on each prompt, kept: an endpoint is asked once. Collective."""
    prompts = [row["prompt"] for row in sides["model"]]
    ours, theirs = ([row["reply"] for row in sides[side]] for side in ("model", "against"))

    def some(picked: list[int]) -> list[tuple[Answer, Answer]]:
        return chat(*([column[row] for row in picked] for column in (prompts, ours, theirs)))

    key = {
        "chat": [chat.url, chat.block.model, chat.block.max_tokens, chat.question],
        "texts": digest([prompts, ours, theirs]),
    }
    answers = kept.measure(context, key, [0] * len(prompts), block.micro_batch, some)
    return [(first, second) for first, second in answers]
