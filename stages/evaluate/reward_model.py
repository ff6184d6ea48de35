"""How well reward models tell the better reply of a pair, on pairs that no stage trains on, and on pairs of another kind."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config.evaluate import ENSEMBLE, Evaluate, RewardTest
from pipeline.config.recipe import digest
from pipeline.config.selection import Scorer
from pipeline.data import encoded
from pipeline.errors import Trouble, UserError
from pipeline.model import begin
from pipeline.model.assemble import assemble, scoring
from pipeline.scoring.classifier import from_outside
from pipeline.stage import Context
from stages.evaluate import kept, pairs, subject
from stages.evaluate.measure import Floats
from stages.evaluate.results import Results

HELD_OUT, OOD = "held out", "ood"
"""What tables call the two kinds of pairs."""

BEFORE = {HELD_OUT: "", OOD: "ood/"}
"""What stands before the names of their metrics."""


@dataclass(frozen=True)
class Pairs:
    """Rows with `chosen_ids`, `rejected_ids` and `said`, the name of each one's source, and by how many tokens chosen is
    longer, float64 [N]."""

    rows: list[dict[str, Any]]
    origins: list[str]
    lengths: Floats


def test(context: Context, block: Evaluate, asked: RewardTest, device: torch.device) -> Results:
    """Every reward model, and all of them as an ensemble, on the held-out pairs and on those of another kind. Collective.
    Raises UserError where there is no pair."""
    batons = [context.batons[scorer.stage] for scorer in asked.of if scorer.stage is not None]
    tok = begin.tokenizer(context, batons[0] if batons else None)
    keys = {HELD_OUT: "reward_model.data"} | ({OOD: "reward_model.ood"} if asked.ood else {})
    data = {kind: encoded.compared(context, tok, asked.max_length, key) for kind, key in keys.items()}
    sets = {kind: chosen_pairs(context, data[kind], asked.rows, key) for kind, key in keys.items()}

    models = Models(context, block, asked, tok, device)
    metrics: dict[str, float] = {}
    tables: dict[str, list[dict[str, Any]]] = {"reliability.jsonl": [], "buckets.jsonl": [], "pairs.jsonl": []}
    for kind, found in sets.items():
        scores = np.array([models.scores(scorer, found) for scorer in asked.of])
        members = {scorer.name: scores[number] for number, scorer in enumerate(asked.of)}
        if len(members) > 1:
            members[ENSEMBLE] = scores.mean(0)
            metrics |= named(ENSEMBLE, kind, pairs.agreement(scores))
        for member, given in members.items():
            numbers, curve, buckets = told(given, found, block.seed)
            metrics |= named(member, kind, numbers)
            place = {"model": member, "set": kind}
            tables["reliability.jsonl"] += [place | point for point in curve]
            tables["buckets.jsonl"] += [place | bucket for bucket in buckets]
            if kind == OOD:
                lost = metrics[f"reward_model/{member}/accuracy"] - numbers["accuracy"]
                metrics |= named(member, kind, {"drop": lost})
        tables["pairs.jsonl"] += [
            {
                "set": kind,
                "source": found.origins[row],
                "longer": found.lengths[row],
                "scores": {member: given[row].tolist() for member, given in members.items()},
            }
            for row in range(len(found.rows))
        ]
    return Results(metrics, tables, {keys[kind]: rows.counts for kind, rows in data.items()})


def named(member: str, kind: str, numbers: dict[str, float]) -> dict[str, float]:
    """The numbers of a model on a kind of pairs, as metrics call them."""
    return {f"reward_model/{member}/{BEFORE[kind]}{name}": value for name, value in numbers.items()}


def chosen_pairs(context: Context, data: encoded.Encoded, most: int, key: str) -> Pairs:
    """The first held-out pairs, of several sources each in proportion."""
    rows = list(data.held_out.select(range(min(most, len(data.held_out)))))
    if not rows:
        raise UserError(
            context.recipe.where("stages", context.stage, key),
            "no held-out pair",
            expected="at least one",
            fix="raise data.holdout or max_length",
        )
    origins = [data.names[number] for number in data.held_out_from[: len(rows)]]
    lengths = [float(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in rows]
    return Pairs(rows, origins, np.array(lengths))


def told(scores: Floats, found: Pairs, seed: int) -> tuple[dict[str, float], list[Any], list[Any]]:
    """(numbers by name, the reliability curve, the buckets by length) of `scores` [N, 2] of chosen and rejected."""
    margins = scores[:, 0] - scores[:, 1]
    numbers = {"pairs": float(len(margins)), **pairs.accuracy(margins, found.lengths, seed)}
    for source in sorted(set(found.origins)) if len(set(found.origins)) > 1 else ():
        inside = np.array([origin == source for origin in found.origins])
        part = {"pairs": float(inside.sum()), **pairs.accuracy(margins[inside], found.lengths[inside], seed)}
        numbers |= {f"source/{source}/{name}": value for name, value in part.items()}
    curve = pairs.reliability(margins)
    numbers["ece"] = pairs.calibration_error(curve)
    for name, values in (("chosen", scores[:, 0]), ("rejected", scores[:, 1]), ("margin", margins)):
        numbers |= {f"{name}/{key}": value for key, value in pairs.distribution(values).items()}
    return numbers, curve, pairs.by_length(margins, found.lengths)


def check_finite(name: str, scores: list[list[float]]) -> None:
    """Raise Trouble where the reward model `name` has a score that compares with nothing."""
    for number, (chosen, rejected) in enumerate(scores, 1):
        if not math.isfinite(chosen - rejected):
            raise Trouble(f"{name} scores pair {number} of {len(scores)} {chosen:g} and {rejected:g}: not finite")


class Models:
    """The reward models: roles on shared weights, and models from outside."""

    def __init__(self, context: Context, block: Evaluate, asked: RewardTest, tok: Any, device: torch.device) -> None:
        self.context, self.size, self.pad, self.device = context, block.micro_batch, tok.pad_token_id, device
        roles = {f"reward{number}": scorer for number, scorer in enumerate(asked.of) if scorer.stage is not None}
        parts = {role: scoring(context.batons[str(scorer.stage)], block.base) for role, scorer in roles.items()}
        self.role_of = {scorer.name: role for role, scorer in roles.items()}
        self.roles = assemble(context, parts, tok, sharded=False).to(device) if parts else None
        self.outside = {
            scorer.name: from_outside(
                context.recipe,
                scorer,
                context.recipe.where("stages", context.stage, "reward_model", "of", str(number)),
                device,
            )
            for number, scorer in enumerate(asked.of)
            if scorer.model is not None
        }

    def scores(self, scorer: Scorer, found: Pairs) -> list[list[float]]:
        """[score of chosen, of rejected] for each pair. Collective. Raises Trouble for a score that is not finite."""
        read = self._said if scorer.model is not None else self._ids
        key = {"of": subject.judge_identity(self.context, scorer), "pairs": digest(found.rows)}
        lengths = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in found.rows]

        def some(picked: list[int]) -> list[list[float]]:
            rows = [found.rows[number] for number in picked]
            both = [read(scorer.name, rows, side) for side in ("chosen", "rejected")]
            return [list(pair) for pair in zip(*both, strict=True)]

        scores = kept.measure(self.context, key, lengths, self.size, some)
        check_finite(scorer.name, scores)
        return scores

    def _ids(self, name: str, rows: list[dict[str, Any]], side: str) -> list[float]:
        texts = [row[f"{side}_ids"] for row in rows]
        width = max(map(len, texts))
        tokens = torch.tensor([text + [self.pad] * (width - len(text)) for text in texts], device=self.device)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        assert self.roles is not None
        with self.roles.evaluating():
            return [float(score) for score in self.roles("scores", self.role_of[name], tokens, lengths)]

    def _said(self, name: str, rows: list[dict[str, Any]], side: str) -> list[float]:
        said = [json.loads(row["said"]) for row in rows]
        replies = [row[1 if side == "chosen" else 2] for row in said]
        return self.outside[name]([row[0] for row in said], replies)
