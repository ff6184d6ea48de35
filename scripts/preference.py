"""DPO and its kin against PPO on the embedded default, from one SFT policy and the same preferences: a section of a page.

python scripts/preference.py --out docs/results/algorithms.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sections import put

Point = tuple[str, str]
"""A loss of `LOSSES`, or PPO, and a learning rate."""

PAIRS = {
    "kind": "dpo",
    "init": "sft",
    "data": [{"path": "quickstart/preferences.jsonl"}],
    "epochs": 2,
    "batch": 32,
}
"""As many passes over the pairs as the quickstart's reward model makes."""

RATES = ("1e-4", "3e-4", "1e-3")
"""The learning rates tried on the first seed; the one whose replies win most often by the rule is every seed's."""

RULE = "pipeline.recipes.quickstart.corpus:judge"
COMPARE = {
    "kind": "evaluate",
    "against": "sft",
    "reward": ["reward"],
    "judge": RULE,
    "prompts": [{"path": "quickstart/prompts.jsonl"}],
    "sampling": {"max_prompt_length": 32, "max_response_length": 40},
}
PPO = "ppo"
LOSSES: dict[str, dict[str, Any]] = {
    "dpo, beta 0.1": {**PAIRS, "beta": 0.1},
    "dpo, beta 0.5": {**PAIRS, "beta": 0.5},
    "ipo, beta 0.1": {**PAIRS, "loss": "ipo", "beta": 0.1},
    "simpo, beta 2": {**PAIRS, "loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
}
HEADING = "## Direct preference optimisation beside PPO"
COLUMNS = ("judge/model", "kl", "score/reward/model", "length/model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/preference"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    first, *others = arguments.seeds
    tried = run(first, arguments.runs / str(first), [(loss, rate) for loss in LOSSES for rate in RATES])
    chosen = [(loss, max(RATES, key=lambda rate: tried[loss, rate]["judge/win_rate"])) for loss in LOSSES]
    found = {first: tried} | {seed: run(seed, arguments.runs / str(seed), chosen) for seed in others}
    put(arguments.out, HEADING, section(arguments.seeds, found, chosen))
    print(arguments.out.read_text(encoding="utf-8"))


def name(loss: str, rate: str) -> str:
    """The stage that trains by a loss at a rate; the one that compares it with SFT is called `<name>_evaluate`."""
    return f"{loss}_{rate}".translate(str.maketrans({",": "", " ": "_", ".": "", "-": ""}))


def run(seed: int, folder: Path, points: list[Point]) -> dict[Point, dict[str, float]]:
    """The metrics of the comparison with SFT, of PPO and of every point."""
    command = [str(Path(sys.executable).parent / "relay"), "run", "quickstart", "--run-dir", str(folder)]
    command += ["--set", f"seed={seed}"]
    stages = {(PPO, ""): PPO} | {(loss, rate): name(loss, rate) for loss, rate in points}
    for (loss, rate), stage in stages.items():
        if loss in LOSSES:
            command += ["--set", f"stages.{stage}={json.dumps({**LOSSES[loss], 'lr': float(rate)})}"]
        command += ["--set", f"stages.{stage}_evaluate={json.dumps({**COMPARE, 'model': stage})}"]
    subprocess.run(command, check=True)
    return {point: metrics(folder / f"{stage}_evaluate") for point, stage in stages.items()}


def metrics(stage: Path) -> dict[str, float]:
    return dict(json.loads((stage / "output" / "manifest.json").read_text(encoding="utf-8"))["metrics"])


def section(seeds: list[int], found: dict[int, dict[Point, dict[str, float]]], chosen: list[Point]) -> str:
    versions = ", ".join(f"{lib} {version(lib)}" for lib in ("torch", "transformers", "trl", "peft", "deepspeed"))
    lines = [
        f"`python scripts/preference.py --seeds {' '.join(map(str, seeds))} --out docs/results/algorithms.md`, on "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {versions}.",
        "",
        "Everything starts from one SFT policy and learns from the same preferences, two passes each: PPO through its reward",
        "model, the others directly. Replies to the held-out prompts, beside those of SFT with the same noise: the share that",
        "the rule which made the preferences (0 to 3) scores higher, a tie one half, and its 95 % interval; the rule's mean",
        "score; KL to SFT in nats per reply; mean score of the reward model, which only PPO has seen; tokens per reply.",
        "",
        f"Learning rates were searched on seed {seeds[0]} alone:",
        "",
        *table(["loss", "lr"], [(*point, found[seeds[0]][point]) for point in found[seeds[0]] if point[1]]),
        "",
        "The rate with the highest win rate, on every seed; PPO is the quickstart's:",
        "",
        *table(
            ["method", "lr", "seed"],
            [(*point, seed, found[seed][point]) for point in [(PPO, ""), *chosen] for seed in seeds],
        ),
    ]
    return "\n".join(lines) + "\n"


def table(first: list[str], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of Markdown; a row's last item is its metrics."""
    heads = [*first, "win rate by the rule", "score by the rule", "KL", "reward model's score", "tokens"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for *cells, row in rows:
        rate, low, high = (row[f"judge/win_rate{end}"] for end in ("", "_low", "_high"))
        shown = [f"{rate:.2f} ({low:.2f} to {high:.2f})", *(f"{row[column]:.2f}" for column in COLUMNS)]
        lines.append("| " + " | ".join([*map(str, cells), *shown]) + " |")
    return lines


if __name__ == "__main__":
    main()
