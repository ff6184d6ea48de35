"""Replies of one policy beside those of another on held-out prompts, scored by reward models and by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from pipeline.config.evaluate import Evaluate, Policy
from pipeline.config.schema import FunctionReward
from pipeline.data import encode, encoded
from pipeline.errors import UserError
from pipeline.generation.rollout import Rollout, keys
from pipeline.model import begin
from pipeline.model.assemble import assemble, plain, scoring
from pipeline.model.load import eos_ids
from pipeline.scoring.classifier import from_outside
from pipeline.scoring.source import build, checked
from pipeline.stage import Context
from stages.evaluate import kept, subject
from stages.evaluate.results import Results
from stages.evaluate.statistics import win_rate

TESTED, AGAINST = "tested", "against"
"""The two policies' roles. PEFT looks for an adapter's name in the names of parameters, most of which say `model`."""

Record = dict[str, Any]


def compare(context: Context, block: Evaluate, device: torch.device) -> Results:
    """Both policies' replies to the first `rows` held-out prompts, side by side. Raises UserError when there is none."""
    where = context.recipe.where("stages", context.stage, "judge")
    judge = build(FunctionReward(function=block.judge), where) if block.judge else None

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
    metrics = summary(sides, [scorer.name for scorer in block.reward], origins)
    if judge is not None:
        rows = [prompt.row for prompt in prompts]
        scores = {
            side: checked(judge, [r["prompt"] for r in records], [r["reply"] for r in records], rows)
            for side, records in sides.items()
        }
        metrics |= compared("judge", scores["model"], scores["against"], block.seed)
        metrics |= by_source("judge", scores["model"], scores["against"], origins)
    return Results(metrics, {"samples.jsonl": side_by_side(sides)}, {"": counts})


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
                "length": int(rollout.lengths[row]),
                "ended": bool(rollout.ended[row]),
                "scores": {name: float(value[row]) for name, value in scores.items()},
            }
            for row in range(len(rollout.lengths))
        ]
        for name, classifier in self.outside.items():
            found = classifier([r["prompt"] for r in records], [r["reply"] for r in records])
            for record, score in zip(records, found, strict=True):
                record["scores"][name] = score
        return records


def side_by_side(sides: dict[str, list[Record]]) -> list[Record]:
    """One row per prompt: both replies and their scores."""
    return [
        {
            "prompt": m["prompt"],
            "before": a["reply"],
            "after": m["reply"],
            "scores_before": a["scores"],
            "scores_after": m["scores"],
        }
        for m, a in zip(sides["model"], sides["against"], strict=True)
    ]


def summary(sides: dict[str, list[Record]], rewards: list[str], origins: Sequence[str]) -> dict[str, float]:
    """Means over the held-out prompts, for both sides, and the reward models' win rates; also by the sources of the prompts,
    `origins`."""
    metrics: dict[str, float] = {"prompts": float(len(sides["model"]))}
    for side, rows in sides.items():
        metrics[f"length/{side}"] = sum(r["length"] for r in rows) / len(rows)
        metrics[f"ended/{side}"] = sum(r["ended"] for r in rows) / len(rows)
    metrics["kl"] = sum(r["kl"] for r in sides["model"]) / len(sides["model"])
    for name in rewards:
        ours, theirs = ([r["scores"][name] for r in sides[side]] for side in ("model", "against"))
        metrics |= compared(f"score/{name}", ours, theirs)
        metrics |= by_source(f"score/{name}", ours, theirs, origins)
    return metrics


def compared(name: str, ours: list[float], theirs: list[float], seed: int = 0) -> dict[str, float]:
    """Mean scores of both sides and the share of prompts that `ours` wins, with its 95 % interval."""
    rate, low, high = win_rate(ours, theirs, seed=seed)
    return {
        f"{name}/model": sum(ours) / len(ours),
        f"{name}/against": sum(theirs) / len(theirs),
        f"{name}/win_rate": rate,
        f"{name}/win_rate_low": low,
        f"{name}/win_rate_high": high,
    }


def by_source(name: str, ours: list[float], theirs: list[float], origins: Sequence[str]) -> dict[str, float]:
    """Mean scores of both sides on the prompts of each source; nothing for a single source."""
    found: dict[str, float] = {}
    for source in sorted(set(origins)):
        places = [place for place, origin in enumerate(origins) if origin == source]
        found[f"{name}/{source}/model"] = sum(ours[place] for place in places) / len(places)
        found[f"{name}/{source}/against"] = sum(theirs[place] for place in places) / len(places)
    return found if len(set(origins)) > 1 else {}
