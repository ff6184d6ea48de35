"""Reward against KL for every advantage estimator on the embedded default, seed by seed, as a Markdown page.

python scripts/algorithms.py --out docs/results/algorithms.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pages import measured_on, others

from stages.ppo.advantage import ESTIMATORS

RULE = "pipeline.recipes.quickstart.corpus:judge"
EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS))
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    curves = {
        (name, seed): train(name, seed, arguments.runs / str(seed))
        for seed in arguments.seeds
        for name in arguments.estimators
    }
    text = page(arguments.estimators, arguments.seeds, curves) + others(arguments.out, ESTIMATORS)
    arguments.out.write_text(text, encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def overrides(name: str, seed: int) -> list[str]:
    """The quickstart's PPO with another estimator: as many responses per step, the rule's verdict watched."""
    return [
        f"seed={seed}",
        f"stages.ppo.advantage_estimator={name}",
        f"stages.ppo.samples_per_prompt={max(4, ESTIMATORS[name].samples) if ESTIMATORS[name].samples > 1 else 1}",
        f"stages.ppo.eval_every={EVERY}",
        f"stages.ppo.gold={json.dumps([{'function': RULE}])}",
    ]


def train(name: str, seed: int, folder: Path) -> list[dict[str, float]]:
    """The held-out evaluations of one PPO run; SFT and reward model are shared by the estimators of a seed."""
    command = [
        str(Path(sys.executable).parent / "relay"),
        "run",
        "quickstart",
        "--run-dir",
        str(folder),
        "--until",
        "ppo",
    ]
    for override in overrides(name, seed):
        command += ["--set", override]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "eval/score" in row]


def page(names: list[str], seeds: list[int], curves: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    lines = [
        "# Advantage estimators on the embedded default",
        "",
        "`python scripts/algorithms.py --out docs/results/algorithms.md`, "
        f"{measured_on('torch', 'transformers', 'peft', 'deepspeed')}.",
        "",
        "The quickstart's PPO stage with another `advantage_estimator` and nothing else changed (64 responses per step;",
        "four to a prompt for those that compare them). Each cell is KL to the reference in nats per response / mean score of",
        "the reward model / mean score by the rule (0 to 3), on the held-out prompts, sampled with the same noise. Higher is",
        "better for the last two; only the score was trained on.",
    ]
    for name in names:
        lines += ["", f"## {name}", "", "| step | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
        lines.append("|---|" + "---|" * len(seeds))
        for index, row in enumerate(curves[name, seeds[0]]):
            cells = [curves[name, seed][index] for seed in seeds]
            shown = [f"{c['eval/kl']:.2f} / {c['eval/score']:.2f} / {c['eval/gold']:.3f}" for c in cells]
            lines.append(f"| {row['step']} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
