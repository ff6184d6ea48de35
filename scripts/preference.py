"""DPO and its kin against PPO on the embedded default, from one SFT policy and the same preferences: a section of a page.

python scripts/preference.py --out docs/results/algorithms.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages import measured_on, put

from pipeline.config.recipe import find, parse

Point = tuple[str, str]
"""A method of `METHODS` and its learning rate; an empty one is the recipe's."""

QUICKSTART = parse(find("quickstart"))["stages"]
PAIRS = {"kind": "dpo", "init": "sft", **{key: QUICKSTART["reward"][key] for key in ("data", "epochs", "batch")}}
"""The reward model's rows, as often."""

LOSSES: dict[str, dict[str, Any]] = {
    "dpo, beta 0.1": {**PAIRS, "beta": 0.1},
    "dpo, beta 0.5": {**PAIRS, "beta": 0.5},
    "ipo, beta 0.1": {**PAIRS, "loss": "ipo", "beta": 0.1},
    "simpo, beta 2": {**PAIRS, "loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
}
PPO: Point = ("ppo", "")
METHODS = {"ppo": QUICKSTART["ppo"], **LOSSES}
RATES = ("1e-4", "3e-4", "1e-3")
"""The learning rates of every loss on the first seed; the one whose replies win most often by the rule is every seed's."""

HEADING = "## Direct preference optimisation beside PPO"
COLUMNS = ("judge/model", "kl", "score/reward/model", "length/model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/preference"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    first, *others = arguments.seeds
    search = [(loss, rate) for loss in LOSSES for rate in RATES]
    tried = run(first, arguments.runs / str(first), [PPO, *search])
    chosen = [PPO, *((loss, max(RATES, key=lambda rate: tried[loss, rate]["judge/win_rate"])) for loss in LOSSES)]
    found = {first: tried} | {seed: run(seed, arguments.runs / str(seed), chosen) for seed in others}
    put(arguments.out, HEADING, section(found, search, chosen))
    print(arguments.out.read_text(encoding="utf-8"))


def name(method: str, rate: str) -> str:
    """The stage that trains by a method at a rate; the one that compares it with SFT is called `<name>_evaluate`."""
    return f"{method}_{rate}".rstrip("_").translate(str.maketrans({",": "", " ": "_", ".": "", "-": ""}))


def run(seed: int, folder: Path, points: list[Point]) -> dict[Point, dict[str, float]]:
    """The metrics of every point's comparison with SFT; SFT and the reward model are shared by all of a seed."""
    command = [str(Path(sys.executable).parent / "relay"), "run", "quickstart", "--run-dir", str(folder)]
    command += ["--set", f"seed={seed}"]
    for method, rate in points:
        stage = name(method, rate)
        block = METHODS[method] | ({"lr": float(rate)} if rate else {})
        command += ["--set", f"stages.{stage}={json.dumps(block)}"]
        command += ["--set", f"stages.{stage}_evaluate={json.dumps({**QUICKSTART['evaluate'], 'model': stage})}"]
    subprocess.run(command, check=True)
    return {point: metrics(folder / f"{name(*point)}_evaluate") for point in points}


def metrics(stage: Path) -> dict[str, float]:
    return dict(json.loads((stage / "output" / "manifest.json").read_text(encoding="utf-8"))["metrics"])


def section(found: dict[int, dict[Point, dict[str, float]]], search: list[Point], chosen: list[Point]) -> str:
    first = next(iter(found))
    seeds = " ".join(map(str, found))
    lines = [
        f"`python scripts/preference.py --seeds {seeds} --out docs/results/algorithms.md`, "
        f"{measured_on('torch', 'transformers', 'trl', 'peft', 'deepspeed')}.",
        "",
        "Everything starts from one SFT policy and reads the same pairs as often: the losses directly, PPO through the",
        "quickstart's reward model. PPO also samples replies to the prompts of `prompts.jsonl`, which the losses do not read.",
        "Replies to the held-out prompts, beside those of SFT with the same noise: the share that the rule which made the",
        "pairs (0 to 3) scores higher, a tie one half, and its 95 % interval; the rule's mean score; KL to SFT in nats per",
        "reply; mean score of the reward model, which only PPO has seen; tokens per reply.",
        "",
        f"Learning rates were searched on seed {first} alone, by the win rate:",
        "",
        *table(["loss", "lr"], [(*point, found[first][point]) for point in search]),
        "",
        "The rate with the highest win rate, on every seed; PPO's settings are the quickstart's:",
        "",
        *table(
            ["method", "lr", "seed"],
            [(*point, seed, found[seed][point]) for point in chosen for seed in found],
        ),
    ]
    return "\n".join(lines)


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
