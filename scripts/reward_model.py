"""How good the embedded default's reward model is, alone and with one of another seed, as a Markdown page.

RELAY_TEST_DATA=... python scripts/reward_model.py --out docs/results/reward_model.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages import measured_on, others

from pipeline.config.recipe import find, parse

Row = dict[str, Any]

REWARD = parse(find("quickstart"))["stages"]["reward"]
OTHERS = [{"path": "$RELAY_TEST_DATA/polite-pref/instruction-data-with-preference.json"}]
TEST = {
    "kind": "evaluate",
    "reward_model": {"of": ["reward", "reward2"], "data": REWARD["data"], "ood": OTHERS, "max_length": 128},
}
STAGES = {"reward2": {**REWARD, "seed": 1}, "test": TEST}
"""What is added to the quickstart."""

MEMBERS = ("reward", "reward2", "ensemble")
SETS = {"held out": "", "ood": "ood/"}
"""What tables call the pairs, and what stands before the names of their metrics."""

TOGETHER = {
    "agreement": "prefer the same reply",
    "kappa": "kappa",
    "spearman": "Spearman's correlation",
    "margin_std": "deviation between their margins",
}
"""The metrics of an ensemble's members, and what the page calls them."""

SECTIONS = ("Reliability", "Length", "Scores")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/reward_model"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    command = [str(Path(sys.executable).parent / "relay"), "run", "quickstart", "--run-dir", str(arguments.run)]
    for name, block in STAGES.items():
        command += ["--set", f"stages.{name}={json.dumps(block)}"]
    subprocess.run([*command, "--until", "test"], check=True)
    text = page(arguments.run / "test" / "output") + others(arguments.out, SECTIONS)
    arguments.out.write_text(text, encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def page(output: Path) -> str:
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    curve, buckets = (rows(output / f"{name}.jsonl") for name in ("reliability", "buckets"))
    lines = [
        "# Reward models",
        "",
        "`RELAY_TEST_DATA=... python scripts/reward_model.py --out docs/results/reward_model.md`, "
        f"{measured_on('torch', 'transformers', 'trl', 'peft', 'deepspeed')}.",
        "",
        "The quickstart's stage `reward` (seed 0) and `reward2`, the same with seed 1, as an `evaluate` stage tests them",
        "([evaluate.md](../evaluate.md)). *Held out* are those of the quickstart's preferences that no stage trains on; *ood*",
        "are polite and impolite replies to instructions, as far as they fit the model's 128 tokens: another preference, in",
        "words that the quickstart's tokenizer mostly spells. In brackets 95 % intervals.",
        "",
        *table(
            ["pairs", "model", "number", "accuracy", "the longer reply's", "accuracy over it", "calibration error"],
            [overall(found, given, member) for given in SETS for member in MEMBERS],
        ),
        "",
        *table(["pairs", *TOGETHER.values()], [together(found, given) for given in SETS]),
        "",
        "## Reliability",
        "",
        "Held-out pairs by the probability that a model gives its own preference, and how often that is right.",
        "",
        *table(
            ["model", "probability", "pairs", "mean", "accuracy"],
            [
                [
                    p["model"],
                    between(p, "{:.2f}"),
                    f"{p['pairs']:.0f}",
                    f"{p['confidence']:.3f}",
                    f"{p['accuracy']:.3f}",
                ]
                for p in curve
                if p["set"] == "held out"
            ],
        ),
        "",
        "## Length",
        "",
        "By how many tokens the chosen reply is longer than the rejected one.",
        "",
        *table(
            ["pairs", "model", "longer by", "number", "accuracy", "the longer reply's"],
            [
                [
                    b["set"],
                    b["model"],
                    between(b, "{:.0f}"),
                    f"{b['pairs']:.0f}",
                    share(b, "accuracy"),
                    f"{b['longer']:.3f}",
                ]
                for b in buckets
                if b["model"] != "ensemble"
            ],
        ),
        "",
        "## Scores",
        "",
        *table(
            ["pairs", "model", "of", "mean", "deviation", "5 %", "25 %", "50 %", "75 %", "95 %"],
            [
                [given, member, side, *scores(found, f"reward_model/{member}/{SETS[given]}{side}")]
                for given in SETS
                for member in MEMBERS
                if member != "ensemble"
                for side in ("chosen", "rejected", "margin")
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def overall(found: dict[str, float], given: str, member: str) -> list[str]:
    """A model's line of the first table."""
    before = f"reward_model/{member}/{SETS[given]}"
    here = {name.removeprefix(before): value for name, value in found.items() if name.startswith(before)}
    cells = [share(here, "accuracy"), f"{here['longer']:.3f}", share(here, "over_longer"), f"{here['ece']:.3f}"]
    return [given, member, f"{here['pairs']:.0f}", *cells]


def together(found: dict[str, float], given: str) -> list[str]:
    """What the members are to each other on a kind of pairs."""
    values = [found.get(f"reward_model/ensemble/{SETS[given]}{name}") for name in TOGETHER]
    return [given, *("" if value is None else f"{value:.3f}" for value in values)]


def scores(found: dict[str, float], name: str) -> list[str]:
    return [f"{found[f'{name}/{key}']:.2f}" for key in ("mean", "std", "q05", "q25", "q50", "q75", "q95")]


def share(row: Row, name: str) -> str:
    return f"{row[name]:.3f} ({row[name + '_low']:.3f} to {row[name + '_high']:.3f})"


def between(row: Row, form: str) -> str:
    return f"{form.format(row['low'])} to {form.format(row['high'])}"


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(heads: list[str], lines: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


if __name__ == "__main__":
    main()
