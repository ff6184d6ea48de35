"""Compare two stages on held-out prompts: mean scores of reward models and of a rule, KL, length, win rate, samples.

Reads two policies, any number of reward models and prompts; hands on `results.json` and `samples.jsonl`. Prompts are those
that no stage trains on. Each rank answers its part; models are not sharded.

    deepspeed --num_gpus 2 --module stages.evaluate --recipe quickstart --stage evaluate --run-dir runs/quickstart
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline import engine
from pipeline.config.schema import Evaluate, FunctionReward
from pipeline.data import encode, encoded
from pipeline.errors import UserError
from pipeline.generation.rollout import Rollout, keys
from pipeline.model import begin
from pipeline.model.assemble import assemble, plain, scoring, speaking
from pipeline.model.load import eos_ids
from pipeline.model.roles import Roles
from pipeline.scoring.source import build, checked
from pipeline.stage import Context, main
from stages.evaluate.statistics import win_rate

TESTED, AGAINST = "tested", "against"
"""The two policies' roles. PEFT looks for an adapter's name in the names of parameters, most of which say `model`."""


def evaluate(context: Context) -> None:
    """Two policies side by side on held-out prompts."""
    block = cast(Evaluate, context.block)
    device = engine.start(block.seed)
    where = context.recipe.where("stages", context.stage, "judge")
    judge = build(FunctionReward(function=block.judge), where) if block.judge else None

    parent = context.parent("model")
    tok = begin.tokenizer(context, parent)
    encoder = encode.Encoder(tok)
    _, held_out, counts = encoded.prompts(context, tok, block.sampling.max_prompt_length)
    prompts: list[encode.Prompt] = held_out[: block.rows]
    if not prompts:
        raise UserError(
            context.recipe.where("stages", context.stage, "prompts"),
            "no held-out prompt",
            expected="at least one",
            fix="raise data.holdout or max_prompt_length",
        )

    rewards = {f"reward{i}": name for i, name in enumerate(block.reward)}
    parts = {TESTED: speaking(context, parent), AGAINST: speaking(context, context.parent("against"))}
    parts |= {role: scoring(context.batons[name], block.base) for role, name in rewards.items()}
    roles = assemble(context, parts, tok, sharded=False).to(device)

    sides = {
        side: answers(block, roles, role, prompts, rewards, encoder)
        for side, role in (("model", TESTED), ("against", AGAINST))
    }
    origins = [prompt.source for prompt in prompts]
    metrics = summary(sides, list(rewards.values()), origins)
    if judge is not None:
        rows = [prompt.row for prompt in prompts]
        scores = {
            side: checked(judge, [r["prompt"] for r in records], [r["reply"] for r in records], rows)
            for side, records in sides.items()
        }
        metrics |= compared("judge", scores["model"], scores["against"], block.seed)
        metrics |= by_source("judge", scores["model"], scores["against"], origins)
    table = [
        {
            "prompt": m["prompt"],
            "before": a["reply"],
            "after": m["reply"],
            "scores_before": a["scores"],
            "scores_after": m["scores"],
        }
        for m, a in zip(sides["model"], sides["against"], strict=True)
    ]

    def write(folder: Path) -> None:
        (folder / "results.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in table]
        (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")

    with context.tracker(1, 0) as tracker:
        tracker.log(1, metrics)
    base = begin.base_record(parts[TESTED].base)
    context.publish(write, base=base, method="none", metrics=metrics, counts=counts, zero_stage=0)


def answers(
    block: Evaluate,
    roles: Roles,
    role: str,
    prompts: list[encode.Prompt],
    rewards: dict[str, str],
    encoder: encode.Encoder,
) -> list[dict[str, Any]]:
    """One record per prompt of what `role` replies, in prompt order on every rank; each rank answers its part."""
    mine = list(range(dist.get_rank(), len(prompts), dist.get_world_size()))
    model = plain(roles.trunks[roles.roles[role].trunk])
    size, rows = block.micro_batch or 32, []
    with roles.evaluating():
        for start in range(0, len(mine), size):
            picked = mine[start : start + size]
            numbers = torch.tensor(picked)
            noise = keys(block.seed, 0, numbers, torch.zeros_like(numbers)).to(model.device)
            asked = [prompts[i].ids for i in picked]
            rollout = roles(
                "rollout",
                role,
                asked,
                noise,
                block.sampling,
                pad=encoder.tokenizer.pad_token_id,
                eos=eos_ids(model),
                synced=False,
            )
            rows += describe(roles, rollout, picked, rewards, encoder, block.sampling.temperature)
    return together(rows)


def describe(
    roles: Roles,
    rollout: Rollout,
    picked: list[int],
    rewards: dict[str, str],
    encoder: encode.Encoder,
    temperature: float,
) -> list[dict[str, Any]]:
    """One record per reply: texts, scores of every reward model, KL of the tested policy to the other, length."""
    asked = (rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.logprobs.shape[1], temperature)
    said, _ = roles("log_probs", TESTED, *asked)
    other, _ = roles("log_probs", AGAINST, *asked)
    kl = (said - other).sum(1)
    lengths = rollout.prompt_lengths + rollout.lengths
    scores = {name: roles("scores", role, rollout.tokens, lengths) for role, name in rewards.items()}
    return [
        {
            "index": index,
            "prompt": encoder.text(rollout.tokens[row, : int(rollout.prompt_lengths[row])].tolist()),
            "reply": encoder.text(rollout.response(row)),
            "kl": float(kl[row]),
            "length": int(rollout.lengths[row]),
            "ended": bool(rollout.ended[row]),
            "scores": {name: float(value[row]) for name, value in scores.items()},
        }
        for row, index in enumerate(picked)
    ]


def together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All ranks' records in prompt order."""
    gathered: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    return sorted((row for part in gathered for row in part), key=lambda row: int(row["index"]))


def summary(sides: dict[str, list[dict[str, Any]]], rewards: list[str], origins: Sequence[str]) -> dict[str, float]:
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


if __name__ == "__main__":
    main(evaluate)
