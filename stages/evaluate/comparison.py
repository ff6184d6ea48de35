"""What the replies of two sides say, and what judges say of them: pure functions on one record per prompt and side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.scoring.chat import Answer, score
from stages.evaluate import texts
from stages.evaluate.statistics import length_controlled, win_rate

Record = dict[str, Any]


def side_by_side(sides: dict[str, list[Record]], judged: dict[str, dict[str, list[float]]]) -> list[Record]:
    """One row per prompt: both replies and what judges gave them."""
    return [
        {
            "prompt": m["prompt"],
            "before": a["reply"],
            "after": m["reply"],
            "scores_before": {name.removeprefix("score/"): scores["against"][row] for name, scores in judged.items()},
            "scores_after": {name.removeprefix("score/"): scores["model"][row] for name, scores in judged.items()},
        }
        for row, (m, a) in enumerate(zip(sides["model"], sides["against"], strict=True))
    ]


def summary(sides: dict[str, list[Record]]) -> dict[str, float]:
    """What both sides' replies look like, and the KL of the tested policy to the other in nats per reply."""
    metrics: dict[str, float] = {"prompts": float(len(sides["model"]))}
    for side, rows in sides.items():
        tokens = [row["tokens"] for row in rows]
        found = {
            "length": [row["length"] for row in rows],
            "truncated": [not row["ended"] for row in rows],
            "empty": [not row["reply"].strip() for row in rows],
            "refusals": [texts.refuses(row["reply"]) for row in rows],
            "repetition": [texts.repetition(reply) for reply in tokens],
        }
        metrics |= {f"{name}/{side}": sum(values) / len(rows) for name, values in found.items()}
        metrics |= {f"distinct_{n}/{side}": texts.distinct(tokens, n) for n in (1, 2, 3)}
    metrics["kl"] = sum(r["kl"] for r in sides["model"]) / len(sides["model"])
    return metrics


def compared(name: str, ours: list[float], theirs: list[float], longer: list[float], seed: int) -> dict[str, float]:
    """Mean scores of both sides and the share of prompts that `ours` wins."""
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return {
        f"{name}/model": sum(ours) / len(ours),
        f"{name}/against": sum(theirs) / len(theirs),
        **rates(name, won, longer, seed),
    }


def rates(name: str, won: list[float], longer: list[float], seed: int) -> dict[str, float]:
    """The win rate and the one at equal length, each with its 95 % interval."""
    found: dict[str, float] = {}
    for rate, ends in (
        ("win_rate", win_rate(won, [0.5] * len(won), seed=seed)),
        ("lc_win_rate", length_controlled(won, longer, seed=seed)),
    ):
        found |= {f"{name}/{rate}{end}": value for end, value in zip(("", "_low", "_high"), ends, strict=True)}
    return found


def by_source(name: str, ours: list[float], theirs: list[float], origins: Sequence[str]) -> dict[str, float]:
    """Mean scores of both sides on the prompts of each source; nothing for a single source."""
    found: dict[str, float] = {}
    for source in sorted(set(origins)):
        places = [place for place, origin in enumerate(origins) if origin == source]
        found[f"{name}/{source}/model"] = sum(ours[place] for place in places) / len(places)
        found[f"{name}/{source}/against"] = sum(theirs[place] for place in places) / len(places)
    return found if len(set(origins)) > 1 else {}


def verdicts(answers: list[tuple[Answer, Answer]], longer: list[float], seed: int) -> dict[str, float]:
    """Win rates by the chat judge; how often it answers the place and not the reply (both times the first, or both times the
    second), and how many of its answers say nothing that can be read."""
    placed = [answer in (("A", "A"), ("B", "B")) for answer in answers]
    unread = [not said for answer in answers for said in answer]
    return {
        **rates("chat_judge", [score(answer) for answer in answers], longer, seed),
        "chat_judge/inconsistent": sum(placed) / len(placed),
        "chat_judge/unreadable": sum(unread) / len(unread),
    }
