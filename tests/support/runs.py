"""Run folders laid down by the writers that training uses, without training: for what reads them."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import handoff, records
from pipeline.config.recipe import load, written
from pipeline.config.schema import Tracking
from pipeline.lock import run_lock
from pipeline.tracking import Tracker

EVALUATED = {
    "judge/model": 2.5,
    "judge/against": 1.5,
    "judge/win_rate": 0.75,
    "judge/win_rate_low": 0.65,
    "judge/win_rate_high": 0.85,
    "kl": 3.0,
    "prompts": 4.0,
    "reward_model/reward/accuracy": 0.9,
    "reward_model/reward/accuracy_low": 0.8,
    "reward_model/reward/accuracy_high": 0.95,
    "reward_model/reward/longer": 0.5,
    "reward_model/reward/ece": 0.03,
}
FORGOTTEN = {
    "measure": "translation",
    "since": "sft",
    "policy": "ppo",
    "before": 0.5,
    "after": 0.4,
    "change": -0.1,
    "low": -0.15,
    "high": -0.05,
    "verdict": "lost",
}
CURVE = [{"model": "reward", "set": "held_out", "confidence": c, "accuracy": c - 0.02, "pairs": 10} for c in (0.6, 0.9)]


class Stop(Exception):
    """A stage that ends before its time."""


def run(folder: Path, *, seed: int = 0, steps: int = 30, until: str = "evaluate", text: str = "It is nice.") -> Path:
    """A finished run of the quickstart's recipe; `until` "ppo" leaves PPO failed in its middle. Replies hold `text`."""
    overrides = [f"seed={seed}"]
    recipe = load("quickstart", overrides)
    with run_lock(folder):
        records.begin(folder, recipe, written(recipe.path, overrides), ["relay", "run", "quickstart"])
        parents: dict[str, str] = {}
        for stage in recipe.order():
            failing = stage == until == "ppo"
            with suppress(Stop):
                (folder / stage).mkdir()
                with records.launch(folder / stage, 2):
                    metrics = _train(folder / stage, recipe.stages[stage].kind, steps, seed, text, failing)
                    parents[stage] = _publish(folder / stage, recipe, stage, metrics, parents, text)
            if failing:
                break
    return folder


def _train(folder: Path, kind: str, steps: int, seed: int, text: str, failing: bool) -> dict[str, float]:
    if kind == "evaluate":
        return EVALUATED
    with tracker(folder, steps) as stream:
        for step in range(1, (steps // 2 if failing else steps) + 1):
            stream.log(step, row(kind, step, seed))
            if kind == "ppo" and step % 10 == 0:
                stream.samples(step, [{"prompt": f"Question {step}?", "reply": text, "score": step / 10, "kl": 0.5}])
        if failing:
            stream.warn(step, "warning: replies grow longer")
            raise Stop("the reward source gave no number for row 7")
    return {"held_out/loss": 0.5 + seed}


def tracker(folder: Path, steps: int, resume: int = 0) -> Tracker:
    return Tracker(
        folder,
        Tracking(),
        run="hh",
        stage=folder.name,
        kind="sft",
        config={},
        total_steps=steps,
        resume_step=resume,
        enabled=True,
    )


def row(kind: str, step: int, seed: int = 0) -> dict[str, float]:
    """Numbers of one step, under the names that the stages log."""
    if kind != "ppo":
        return {"loss": 1.0 / step + seed, "accuracy": 1 - 0.5 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
    wave = math.sin(step)
    return {
        "objective/scores": 0.1 * step + wave + seed,
        "objective/kl": 0.05 * step,
        "objective/entropy": 20 - 0.1 * step,
        "objective/length": 16 + 0.2 * step,
        "policy/clipfrac_avg": 0.05,
        "val/clipfrac_avg": 0.1,
        "val/explained_variance": 1 - 1 / step,
        "time/rollout": 1.0,
        "time/score": 0.5,
        "time/train": 2.0,
    }


def _publish(
    folder: Path, recipe: Any, stage: str, metrics: dict[str, float], parents: dict[str, str], text: str
) -> str:
    kind = recipe.stages[stage].kind

    def write(output: Path) -> None:
        (output / "model.txt").write_text(stage)
        if kind == "evaluate":
            sides = [{"prompt": f"Q{n}?", "before": "No.", "after": text, "scores": {"judge": n}} for n in range(4)]
            for name, rows in (("samples", sides), ("forgetting", [FORGOTTEN]), ("reliability", CURVE)):
                (output / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    facts = {
        "stage": stage,
        "kind": kind,
        "recipe": recipe.name,
        "inputs": {"block": {}},
        "base": {"model": "base", "content_hash": "b" * 64},
        "adapter": "lora",
        "parents": {name: parents[name] for name in recipe.parents(stage)},
        "data": [{"path": "rows.jsonl", "sha256": "d" * 64, "rows": 40, "used": 38, "held out": 2}],
        "seed": 0,
        "world_size": 2,
        "zero_stage": 2,
        "versions": {"torch": "2.13.0"},
        "metrics": metrics,
    }
    return handoff.publish(folder, write, facts).content_hash
