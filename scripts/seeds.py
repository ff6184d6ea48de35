"""Run a recipe on several seeds and write its final metrics, seed by seed, as a Markdown page.

python scripts/seeds.py quickstart --out docs/results/quickstart.md
RELAY_TEST_DATA=... python scripts/seeds.py tests/recipes/polite_stories260k.yaml --out docs/results/polite.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from pages import measured_on

from pipeline import handoff
from pipeline.config.recipe import load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="a paragraph for the page")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument(
        "--largest",
        nargs="*",
        default=[],
        metavar="STAGE:METRIC",
        help="logged metrics whose largest value is shown too",
    )
    arguments = parser.parse_args()
    recipe = load(arguments.recipe, arguments.set)
    columns: dict[int, dict[str, float]] = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"{recipe.name}-{seed}"
        command = [str(Path(sys.executable).parent / "relay"), "run", arguments.recipe, "--run-dir", str(folder)]
        for override in [*arguments.set, f"seed={seed}"]:
            command += ["--set", override]
        began = time.monotonic()
        subprocess.run(command, check=True)
        columns[seed] = metrics(recipe.order(), folder) | {
            f"{name.replace(':', ': ', 1)}, largest of all steps": largest(folder, *name.split(":", 1))
            for name in arguments.largest
        }
        columns[seed]["seconds, all stages"] = time.monotonic() - began
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        page(arguments.recipe, recipe.name, arguments.note, arguments.set, columns), encoding="utf-8"
    )
    print(arguments.out.read_text(encoding="utf-8"))


def metrics(stages: list[str], folder: Path) -> dict[str, float]:
    """Every stage's final metrics as `stage: metric`."""
    found = {}
    for stage in stages:
        for name, value in handoff.open_baton(folder / stage).manifest["metrics"].items():
            found[f"{stage}: {name}"] = value
    return found


def largest(folder: Path, stage: str, metric: str) -> float:
    lines = (folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(row[metric] for row in map(json.loads, lines) if metric in row)


def page(recipe: str, name: str, note: str, overrides: list[str], columns: dict[int, dict[str, float]]) -> str:
    sets = "".join(f" --set {override}" for override in overrides)
    seeds = list(columns)
    lines = [
        f"# {name}",
        "",
        f"`relay run {recipe}{sets} --set seed=N`, {measured_on('torch', 'transformers', 'trl', 'peft', 'deepspeed')}.",
        "",
        "| metric | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|" + "---|" * len(seeds),
    ]
    for metric in columns[seeds[0]]:
        lines.append(f"| {metric} | " + " | ".join(f"{columns[seed][metric]:.4g}" for seed in seeds) + " |")
    if note:
        lines += ["", note]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
