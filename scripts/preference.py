"""DPO and its kin against PPO on the embedded default, from the same SFT policy and the same preferences, as Markdown.

python scripts/preference.py --out docs/results/preference.md
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

PAIRS = {
    "kind": "dpo",
    "init": "sft",
    "data": [{"path": "quickstart/preferences.jsonl"}],
    "epochs": 2,
    "batch": 32,
    "lr": 1.0e-3,
}
"""As many passes over the pairs as the quickstart's reward model makes."""

RULE = "pipeline.recipes.quickstart.corpus:judge"
COMPARE = {
    "kind": "evaluate",
    "against": "sft",
    "reward": ["reward"],
    "judge": RULE,
    "prompts": [{"path": "quickstart/prompts.jsonl"}],
    "sampling": {"max_prompt_length": 32, "max_response_length": 40},
}
METHODS: dict[str, dict[str, Any] | None] = {
    "ppo": None,
    "dpo, beta 0.1": {**PAIRS, "beta": 0.1},
    "dpo, beta 0.5": {**PAIRS, "beta": 0.5},
    "ipo, beta 0.1": {**PAIRS, "loss": "ipo", "beta": 0.1},
    "simpo, beta 2": {**PAIRS, "loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
}
COLUMNS = ("judge/model", "kl", "score/reward/model", "length/model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/preference"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {seed: run(seed, arguments.runs / str(seed)) for seed in arguments.seeds}
    arguments.out.write_text(page(arguments.seeds, found), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def names(method: str) -> tuple[str, str]:
    """(its stage, the stage that compares it with SFT)."""
    stage = method.translate(str.maketrans({",": "", " ": "_", ".": ""}))
    return stage, f"{stage}_evaluate"


def run(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each method's comparison with SFT."""
    command = [str(Path(sys.executable).parent / "relay"), "run", "quickstart", "--run-dir", str(folder)]
    command += ["--set", f"seed={seed}"]
    for method, block in METHODS.items():
        stage, compare = names(method)
        if block is not None:
            command += ["--set", f"stages.{stage}={json.dumps(block)}"]
        command += ["--set", f"stages.{compare}={json.dumps({**COMPARE, 'model': stage})}"]
    subprocess.run(command, check=True)
    return {method: metrics(folder / names(method)[1]) for method in METHODS}


def metrics(stage: Path) -> dict[str, float]:
    return dict(json.loads((stage / "output" / "manifest.json").read_text(encoding="utf-8"))["metrics"])


def page(seeds: list[int], found: dict[int, dict[str, dict[str, float]]]) -> str:
    versions = ", ".join(f"{lib} {version(lib)}" for lib in ("torch", "transformers", "trl", "peft", "deepspeed"))
    lines = [
        "# DPO against PPO on the embedded default",
        "",
        f"`python scripts/preference.py --seeds {' '.join(map(str, seeds))} --out docs/results/preference.md`, on "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {versions}.",
        "",
        "Everything starts from one SFT policy and learns from the same preferences, two passes each: PPO through its reward",
        "model, the others directly. Replies to the held-out prompts, beside those of SFT with the same noise: the share that",
        "the rule which made the preferences (0 to 3) scores higher, a tie one half, and its 95 % interval; the rule's mean",
        "score; KL to SFT in nats per reply; mean score of the reward model, which only PPO has seen; tokens per reply.",
        "",
        "| method | seed | win rate by the rule | score by the rule | KL | reward model's score | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for seed in seeds:
            row = found[seed][method]
            rate, low, high = (row[f"judge/win_rate{end}"] for end in ("", "_low", "_high"))
            cells = [f"{rate:.2f} ({low:.2f} to {high:.2f})", *(f"{row[name]:.2f}" for name in COLUMNS)]
            lines.append(f"| {method} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
