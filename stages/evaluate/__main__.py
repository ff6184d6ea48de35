"""Compare two stages on held-out prompts: mean scores of reward models and of a rule, KL, length, win rate, samples.

Reads two policies, any number of reward models and prompts; hands on `results.json` and `samples.jsonl`. Prompts are those
that no stage trains on. Each rank answers its part; models are not sharded.

    deepspeed --num_gpus 2 --module stages.evaluate --recipe quickstart --stage evaluate --run-dir runs/quickstart
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline import engine
from pipeline.config.schema import Evaluate
from pipeline.data import encode
from pipeline.data.split import load
from pipeline.errors import UserError
from pipeline.generation.rollout import Rollout, keys
from pipeline.model import begin
from pipeline.model.assemble import assemble, plain, scoring, speaking
from pipeline.model.load import eos_ids, tokenizer
from pipeline.model.roles import Roles
from pipeline.scoring.function import load_function
from pipeline.stage import Context, main
from stages.evaluate.statistics import win_rate


def evaluate(context: Context) -> None:
    """Two policies side by side on held-out prompts."""
    block = cast(Evaluate, context.block)
    device = engine.start(block.seed)
    judge = load_function(block.judge, context.recipe.where("stages", context.stage, "judge")) if block.judge else None

    parent = context.parent("model")
    tok = tokenizer(str(parent.path) if parent else context.base, block.base.revision)
    encoder, split = encode.Encoder(tok), load(context.recipe, context.stage)
    prompts = encode.prompts(encoder, split, "held_out", block.sampling.max_prompt_length)[: block.rows]
    if not prompts:
        raise UserError(
            context.recipe.where("stages", context.stage, "prompts"),
            "no held-out prompt",
            expected="at least one",
            fix="raise data.holdout or max_prompt_length",
        )

    rewards = {f"reward{i}": name for i, name in enumerate(block.reward)}
    parts = {"model": speaking(context, parent), "against": speaking(context, context.parent("against"))}
    parts |= {role: scoring(context.batons[name], block.base) for role, name in rewards.items()}
    roles = assemble(context, parts, tok, sharded=False).to(device)

    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(prompts), world))
    eos = eos_ids(plain(roles.trunks[roles.roles["model"].trunk]))
    answers: dict[str, list[dict[str, Any]]] = {"model": [], "against": []}
    size = block.micro_batch or 32
    with roles.evaluating():
        for start in range(0, len(mine), size):
            picked = mine[start : start + size]
            for side, rows in answers.items():
                numbers = torch.tensor(picked)
                noise = keys(block.seed, 0, numbers, torch.zeros_like(numbers)).to(device)
                rollout = roles(
                    "rollout",
                    side,
                    [prompts[i] for i in picked],
                    noise,
                    block.sampling,
                    pad=tok.pad_token_id,
                    eos=eos,
                    synced=False,
                )
                rows += describe(roles, rollout, picked, rewards, encoder, block.sampling.temperature)
    sides = {side: together(rows) for side, rows in answers.items()}

    metrics = summary(sides, list(rewards.values()))
    if judge is not None:
        scores = {side: judge([r["prompt"] for r in rows], [r["reply"] for r in rows]) for side, rows in sides.items()}
        for side, values in scores.items():
            metrics[f"judge/{side}"] = sum(values) / len(values)
        rate, low, high = win_rate(scores["model"], scores["against"], seed=block.seed)
        metrics |= {"judge/win_rate": rate, "judge/win_rate_low": low, "judge/win_rate_high": high}
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
    base = begin.base_record(parts["model"].base)
    context.publish(write, base=base, method="none", metrics=metrics, split=split, zero_stage=0)


def describe(
    roles: Roles,
    rollout: Rollout,
    picked: list[int],
    rewards: dict[str, str],
    encoder: encode.Encoder,
    temperature: float,
) -> list[dict[str, Any]]:
    """One record per reply: texts, scores of every reward model, KL of `model` to `against` over the reply, length."""
    width = rollout.logprobs.shape[1]
    said, _ = roles("log_probs", "model", rollout.tokens, rollout.prompt_lengths, width, temperature)
    other, _ = roles("log_probs", "against", rollout.tokens, rollout.prompt_lengths, width, temperature)
    kl = ((said - other) * rollout.mask).sum(1)
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


def summary(sides: dict[str, list[dict[str, Any]]], rewards: list[str]) -> dict[str, float]:
    """Means over the held-out prompts, for both sides."""
    metrics: dict[str, float] = {"prompts": float(len(sides["model"]))}
    for side, rows in sides.items():
        for name in rewards:
            metrics[f"score/{name}/{side}"] = sum(r["scores"][name] for r in rows) / len(rows)
        metrics[f"length/{side}"] = sum(r["length"] for r in rows) / len(rows)
        metrics[f"ended/{side}"] = sum(r["ended"] for r in rows) / len(rows)
    metrics["kl"] = sum(r["kl"] for r in sides["model"]) / len(sides["model"])
    for name in rewards:
        ours, theirs = ([r["scores"][name] for r in sides[side]] for side in ("model", "against"))
        rate, low, high = win_rate(ours, theirs)
        metrics |= {
            f"score/{name}/win_rate": rate,
            f"score/{name}/win_rate_low": low,
            f"score/{name}/win_rate_high": high,
        }
    return metrics


if __name__ == "__main__":
    main(evaluate)
