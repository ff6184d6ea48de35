"""What PPO forgets on its way, with a KL budget and without, seed by seed, as a Markdown page with a plot.

RELAY_TEST_DATA=... python scripts/forgetting.py --out docs/results/forgetting.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.config.recipe import find, parse  # noqa: E402
from pipeline.recipes.quickstart import corpus  # noqa: E402
from scripts.bench_plot import scatter  # noqa: E402
from scripts.pages import measured_on  # noqa: E402

STORIES = "$RELAY_TEST_DATA/tinystories/tinystories_1000.json"
MODELS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "recipe": "quickstart",
        "steps": (15, 30, 60),
        "perplexity": {"data": [{"path": "{general}"}], "rows": 256},
        "continuation": {"data": [{"path": "{general}"}], "rows": 256, "context": 16, "length": 8},
    },
    "stories260K": {
        "recipe": "tests/recipes/polite_stories260k.yaml",
        "steps": (10, 20, 40),
        "perplexity": {"data": [{"path": STORIES}], "rows": 256},
        "continuation": {"data": [{"path": STORIES}], "rows": 256},
        "others": {
            "translation": {"path": "$RELAY_TEST_DATA/tatoeba-en-zh/cmn.txt", "rows": 100},
            "code": {"path": "$RELAY_TEST_DATA/human-eval/HumanEval.jsonl.gz", "rows": 40, "max_response_length": 128},
            "truthfulqa": {"path": "$RELAY_TEST_DATA/truthfulqa/TruthfulQA.csv", "rows": 100},
            "gsm8k": {"path": "$RELAY_TEST_DATA/gsm8k/test.jsonl.gz", "rows": 100, "max_response_length": 128},
        },
    },
}
"""By name: the recipe whose PPO stage is run, how long, and what the model could do before; `others` is measured once, on the
base and SFT. `{general}` are texts of the kind
that the quickstart's base was trained on, made by the same grammar with another seed."""

GENERAL_SEED = 1000

ARMS = {"with": None, "without": 0.0}
"""The KL coefficient: the recipe's, and none."""

MEASURES = {"perplexity/loss": "loss, nats per token", "continuation/accuracy": "right continuations, of 4"}
Point = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    general = arguments.runs.resolve() / "general.jsonl"
    texts = corpus.pretraining_text(GENERAL_SEED, 400)
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found = {
        (model, seed): run(model, seed, arguments.runs / f"{model}-{seed}", general)
        for model in MODELS
        for seed in arguments.seeds
    }
    first = arguments.seeds[0]
    before = {model: by_sft(model, first, arguments.runs / f"{model}-{first}", general) for model in MODELS}
    arguments.out.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
    arguments.out.write_text(page(arguments.seeds, found, before, arguments.out.stem), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def run(model: str, seed: int, folder: Path, general: Path) -> dict[Point, dict[str, Any]]:
    """For every arm and length of PPO: its KL to SFT on held-out prompts, mean score, and the changes since SFT."""
    settings = MODELS[model]
    ppo = parse(find(settings["recipe"]))["stages"]["ppo"]
    points = [(arm, steps) for arm in ARMS for steps in settings["steps"]]
    command = [str(Path(sys.executable).parent / "relay"), "run", settings["recipe"], "--run-dir", str(folder)]
    command += ["--set", f"seed={seed}", "--until", "forgetting"]
    for arm, steps in points:
        kl = ppo["kl"] if ARMS[arm] is None else {"coef": ARMS[arm]}
        block = {**ppo, "steps": steps, "kl": kl, "warmup": 0, "eval_every": steps, "signals": {"kl_budget": None}}
        command += ["--set", f"stages.{arm}_{steps}={json.dumps(block)}"]
    forgetting = {"of": ["sft", *(f"{arm}_{steps}" for arm, steps in points)]}
    forgetting |= {suite: settings[suite] for suite in ("perplexity", "continuation")}
    command += ["--set", f"stages.forgetting={stage(forgetting, general)}"]
    subprocess.run(command, check=True)
    since_sft = [row for row in changes(folder / "forgetting") if row["since"] == "sft"]
    return {
        (arm, steps): {
            **metrics(folder / f"{arm}_{steps}"),
            **{row["measure"]: row for row in since_sft if row["policy"] == f"{arm}_{steps}"},
        }
        for arm, steps in points
    }


def by_sft(model: str, seed: int, folder: Path, general: Path) -> list[dict[str, Any]]:
    """The changes from the base to SFT, in the same run."""
    settings = MODELS[model]
    suites = {suite: settings[suite] for suite in ("perplexity", "continuation")} | settings.get("others", {})
    command = [str(Path(sys.executable).parent / "relay"), "run", settings["recipe"], "--run-dir", str(folder)]
    command += ["--set", f"seed={seed}", "--until", "by_sft"]
    command += ["--set", f"stages.by_sft={stage({'of': ['base', 'sft'], **suites}, general)}"]
    subprocess.run(command, check=True)
    return changes(folder / "by_sft")


def stage(forgetting: dict[str, Any], general: Path) -> str:
    return json.dumps({"kind": "evaluate", "forgetting": forgetting}).replace("{general}", str(general))


def changes(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "output" / "forgetting.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def metrics(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "output" / "manifest.json").read_text(encoding="utf-8"))["metrics"])


def plot(found: dict[tuple[str, int], dict[Point, dict[str, Any]]]) -> str:
    """A panel for each model and measure: the change since SFT against KL; each point is named by its arm and seed."""
    panels = []
    for model in MODELS:
        for measure, label in MEASURES.items():
            points = [
                (f"{arm} {seed}", max(row["eval/kl"], 1e-2), row[measure]["change"])
                for (of, seed), rows in found.items()
                for (arm, _), row in rows.items()
                if of == model
            ]
            panels.append((f"{model}: change in {label}", points))
    return scatter(panels, "KL to SFT, nats per reply")


def page(
    seeds: list[int],
    found: dict[tuple[str, int], dict[Point, dict[str, Any]]],
    before: dict[str, list[dict[str, Any]]],
    stem: str,
) -> str:
    lines = [
        "# What PPO forgets",
        "",
        "`python scripts/forgetting.py --out docs/results/forgetting.md`, "
        f"{measured_on('torch', 'transformers', 'trl', 'peft', 'deepspeed')}.",
        "",
        "PPO from one SFT policy, for as many steps as said, with the recipe's KL penalty and without one. KL and the reward",
        "model's score are on held-out prompts. What the base could do and no stage trains: loss on general text in nats per",
        "token (lower is better), and how often a text's own continuation is likelier than three others (a guess: 0.25). Each",
        "cell is the change since SFT with its 95 % paired bootstrap interval, and the verdict.",
    ]
    for model in MODELS:
        heads = ["KL penalty", "steps", "seed", "KL", "score", *MEASURES.values()]
        lines += ["", f"## {model}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for arm in ARMS:
            for steps in MODELS[model]["steps"]:
                for seed in seeds:
                    row = found[model, seed][arm, steps]
                    cells = [arm, steps, seed, f"{row['eval/kl']:.2f}", f"{row['eval/score']:.2f}"]
                    cells += [cell(row[measure]) for measure in MEASURES]
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += ["", f"From the base to SFT, seed {seeds[0]}:", ""]
        lines += ["| measure | base | SFT | change | verdict |", "|---|---|---|---|---|"]
        for row in before[model]:
            change = f"{row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
            cells = [row["measure"], f"{row['before']:.3f}", f"{row['after']:.3f}", change, row["verdict"]]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"![change since SFT against KL]({stem}.svg)"]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    return f"{row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), {row['verdict']}"


if __name__ == "__main__":
    main()
