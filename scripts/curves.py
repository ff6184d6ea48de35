"""Curves of PPO healthy and made sick on purpose: the images of docs/curves.md, and their numbers in docs/results/curves.md.

    python scripts/curves.py --runs FOLDER      # SFT and reward model once, then PPO in each way; about 15 minutes on two cores

Every case is the embedded quickstart with one thing changed, on the same SFT policy and reward model. The held-out replies are
also scored by the rule that made the preferences (`eval/gold`), which is never trained on. What `--runs` holds already is not
run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

from bench_plot import Curve, curves
from pages import measured_on

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RULE = json.dumps([{"function": "pipeline.recipes.quickstart.corpus:judge"}])
COMMON = ["stages.ppo.eval_every=10", f"stages.ppo.gold={RULE}"]
CASES: dict[str, tuple[str, list[str]]] = {
    "healthy": ("as the recipe is", []),
    "lr": ("learning rate of the policy x 30", ["stages.ppo.lr=0.03", "stages.ppo.critic.lr=0.001"]),
    "kl": ("no KL penalty, 100 steps", ["stages.ppo.kl.coef=0", "stages.ppo.steps=100"]),
    "critic": (
        "critic that never learns, 30 steps",
        ['stages.ppo.critic={"init": "policy", "lr": 1e-9}', "stages.ppo.steps=30"],
    ),
    "temperature": ("sampled at temperature 2, 30 steps", ["stages.ppo.sampling.temperature=2", "stages.ppo.steps=30"]),
}
"""Case -> (what is wrong, the overrides that make it so)."""
PANELS: dict[str, list[str]] = {
    "healthy": [
        "objective/scores", "objective/kl", "objective/length", "policy/entropy_avg",
        "policy/clipfrac_avg", "policy/approxkl_avg", "loss/value_avg", "val/explained_variance",
    ],
    "lr": ["objective/scores", "objective/kl", "policy/clipfrac_avg", "policy/approxkl_avg",
           "policy/entropy_avg", "grad_norm/policy"],
    "kl": ["objective/scores", "objective/kl", "eval/score", "eval/gold", "policy/entropy_avg",
           "objective/length"],
    "critic": ["objective/scores", "loss/value_avg", "val/explained_variance", "objective/kl"],
    "temperature": ["objective/scores", "eval/score", "objective/length", "val/truncated_responses",
                    "policy/entropy_avg", "objective/kl"],
}  # fmt: skip
"""Case -> what its image shows, beside the healthy run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--draw", action="store_true", help="run nothing: draw what was run so far")
    arguments = parser.parse_args()
    if not arguments.draw:
        for stage in ("sft", "reward"):
            run(arguments.runs / "shared", stage, [])
        for case in arguments.cases:
            folder = arguments.runs / case
            if not folder.exists():
                shutil.copytree(arguments.runs / "shared", folder)
            run(folder, "ppo", [*COMMON, *CASES[case][1]])
    found = {case: read(arguments.runs / case) for case in CASES if (arguments.runs / case / "ppo" / "output").exists()}
    for case, columns in found.items():
        image = DOCS / "images" / f"curves_{case}.svg"
        image.parent.mkdir(exist_ok=True)
        image.write_text(draw(case, columns, found["healthy"]), encoding="utf-8")
    (DOCS / "results" / "curves.md").write_text(page(found), encoding="utf-8")


def run(folder: Path, until: str, overrides: list[str]) -> None:
    command = [
        str(Path(sys.executable).parent / "relay"),
        "run",
        "quickstart",
        "--run-dir",
        str(folder),
        "--until",
        until,
    ]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True)


def read(folder: Path) -> dict[str, Curve]:
    """The columns of PPO's metrics file."""
    columns: dict[str, Curve] = {}
    for line in (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return columns


def draw(case: str, columns: dict[str, Curve], healthy: dict[str, Curve]) -> str:
    beside = {"healthy": healthy} if case == "healthy" else {"healthy": healthy, case: columns}
    return curves([(name, {label: run[name] for label, run in beside.items()}) for name in PANELS[case]], "step")


def page(found: dict[str, dict[str, Curve]]) -> str:
    """Where each curve starts, what it reaches, and where it ends."""
    lines = [
        "# Healthy and sick PPO, in numbers",
        "",
        f"`python scripts/curves.py --runs FOLDER`, {measured_on('torch', 'transformers', 'trl', 'peft', 'deepspeed')}. "
        "One seed each, all on one SFT policy and one reward model.",
        "",
        "Each cell: mean of the first five logged values → mean of the last five (least to greatest of all); of `eval/`, the "
        "first → the last. What they mean: [reading the curves](../curves.md).",
        "",
    ]
    lines += [f"- *{case}*: {CASES[case][0]}" + flags(CASES[case][1]) for case in found]
    lines += ["", "| metric | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    names = list(
        dict.fromkeys(
            [
                *(name for panel in PANELS.values() for name in panel),
                "val/identical_responses",
                "eval/score",
                "eval/gold",
                "eval/kl",
            ]
        )
    )
    for name in names:
        lines.append(f"| `{name}` | " + " | ".join(cell(name, columns[name][1]) for columns in found.values()) + " |")
    return "\n".join(lines) + "\n"


def flags(overrides: list[str]) -> str:
    return "".join(f" `--set '{override}'`" for override in overrides)


def cell(name: str, values: list[float]) -> str:
    few = 1 if name.startswith("eval/") else 5
    return f"{mean(values[:few]):.3g} → {mean(values[-few:]):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
