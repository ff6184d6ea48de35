"""MoDS on a noisy set: fine-tuning on the selected tenth beside a random tenth and the whole, as a Markdown page.

python scripts/bench_selection.py --out docs/results/selection.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as parquet
import yaml
from pages import measured_on

from pipeline import handoff
from pipeline.config.kinds import KINDS
from pipeline.config.recipe import load
from pipeline.data.split import position
from pipeline.recipes.quickstart.corpus import PLACES, VIVID, rule_score

QUICKSTART = Path(__file__).resolve().parent.parent / "pipeline" / "recipes" / "quickstart"
HOLDOUT = 0.08
NOISY = 0.6
SETS = ("selected", "random", "full")
COPIED = 5
KEEP, EPOCHS = 0.3, 3
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/selection"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    made = {seed: write_data(arguments.runs, seed) for seed in arguments.seeds}
    chains = recipe(arguments.runs, arguments.seeds, len(made[arguments.seeds[0]].kinds))
    path = arguments.runs / "recipe.yaml"
    path.write_text(yaml.safe_dump(chains, sort_keys=False), encoding="utf-8")
    began = time.monotonic()
    run(path, arguments.runs / "run")
    seconds = time.monotonic() - began
    arguments.out.write_text(page(arguments.runs / "run", arguments.seeds, made, seconds), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Made:
    """What was done to each training row, or `clean`, and the numbers of the rows of the random tenth."""

    kinds: list[str]
    chance: list[int]


def write_data(folder: Path, seed: int) -> Made:
    """Write the noisy training rows, a random tenth of them, and the clean rows that are held out."""
    rows = [json.loads(line) for line in (QUICKSTART / "demonstrations.jsonl").open(encoding="utf-8")]
    train = [row for row in rows if position(row["prompt"]) >= HOLDOUT]
    rng = Random(f"noise:{seed}")
    noisy, kinds = [], []
    for row in train:
        kind = rng.choice(list(NOISE)) if rng.random() < NOISY else "clean"
        noisy.append(NOISE[kind](rng, row, train) if kind in NOISE else row)
        kinds.append(kind)
    write(folder / f"noisy{seed}.jsonl", noisy)
    chance = sorted(rng.sample(range(len(noisy)), len(noisy) // 10))
    write(folder / f"random{seed}.jsonl", [noisy[number] for number in chance])
    write(folder / "held_out.jsonl", [row for row in rows if position(row["prompt"]) < HOLDOUT])
    return Made(kinds, chance)


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shuffled(rng: Random, row: Row, rows: list[Row]) -> Row:
    """The reply to another prompt."""
    return {**row, "completion": rng.choice(rows)["completion"]}


def wrong(rng: Random, row: Row, rows: list[Row]) -> Row:
    """The reply with another place in it."""
    words = [rng.choice(list(PLACES)) if word.strip(".,") in PLACES else word for word in row["completion"].split(" ")]
    return {**row, "completion": " ".join(words)}


def truncated(rng: Random, row: Row, rows: list[Row]) -> Row:
    """The first third of the reply."""
    words = row["completion"].split(" ")
    return {**row, "completion": " ".join(words[: max(1, len(words) // 3)])}


def gibberish(rng: Random, row: Row, rows: list[Row]) -> Row:
    """Words in no order."""
    words = [rng.choice(rng.choice(rows)["completion"].split(" ")) for _ in row["completion"].split(" ")]
    return {**row, "completion": " ".join(words)}


def copied(rng: Random, row: Row, rows: list[Row]) -> Row:
    """One of a few rows, over and over."""
    return rows[rng.randrange(COPIED)]


NOISE = {"shuffled": shuffled, "wrong": wrong, "truncated": truncated, "gibberish": gibberish, "copied": copied}


# ---------------------------------------------------------------- chain


def recipe(folder: Path, seeds: list[int], rows: int) -> dict[str, Any]:
    """One reward model from the shipped comparisons; for each seed the MoDS chain, and fine-tuning on the three sets."""
    comparisons = {"path": str(QUICKSTART / "preferences.jsonl")}
    stages: dict[str, Any] = {
        "reward": {"kind": "reward", "data": [comparisons], "epochs": 2, "batch": 32, "lr": 3e-3, "save_every": 10**6}
    }
    for seed in seeds:
        stages |= chain(folder, seed, rows // 10)
    return {
        "name": "selection",
        "base": {"model": str(QUICKSTART / "base"), "dtype": "fp32"},
        "adapter": {"method": "lora", "r": 8, "alpha": 16},
        "deepspeed": {"config": "zero2", "num_gpus": 1},
        "data": {"holdout": HOLDOUT},
        "stages": stages,
    }


def chain(folder: Path, seed: int, tenth: int) -> dict[str, Any]:
    """MoDS: a seed set of good and different rows, a policy trained on it, the rows that this needs; then the trainings."""
    held_out = {"path": str((folder / "held_out.jsonl").resolve())}
    noisy, chance = ({"path": str((folder / f"{name}{seed}.jsonl").resolve())} for name in ("noisy", "random"))
    sampling = {"max_prompt_length": 32, "max_response_length": 40}
    choose = {"kind": "selection", "reward": "reward", "data": [noisy], "quality": {"keep": KEEP}, "seed": seed}
    choose |= {"sampling": sampling, "max_length": 128}
    train = {"kind": "sft", "epochs": EPOCHS, "batch": 16, "lr": 2e-3, "save_every": 10**6, "seed": seed}
    compare = {"kind": "evaluate", "judge": "pipeline.recipes.quickstart.corpus:judge", "sampling": sampling}
    compare |= {"prompts": [{"path": str(QUICKSTART / "prompts.jsonl")}], "seed": seed, "model": f"sft_selected{seed}"}
    return {
        f"seed{seed}": {**choose, "budget": tenth // 2},
        f"sft_seed{seed}": {**train, "data": [{"stage": f"seed{seed}"}]},
        f"select{seed}": {
            **choose,
            "budget": tenth,
            "include": f"seed{seed}",
            "necessity": {"model": f"sft_seed{seed}", "keep": 0.5},
        },
        f"sft_selected{seed}": {**train, "data": [{"stage": f"select{seed}"}, held_out]},
        f"sft_random{seed}": {**train, "data": [chance, held_out]},
        f"sft_full{seed}": {**train, "data": [noisy, held_out]},
        f"random{seed}": {**compare, "against": f"sft_random{seed}"},
        f"full{seed}": {**compare, "against": f"sft_full{seed}"},
    }


def run(recipe: Path, folder: Path) -> None:
    """All stages that are not up to date, one after the other in this process: starting one for each takes most of the time."""
    from accelerate.state import AcceleratorState, PartialState

    from pipeline import chain, launch, stage

    os.environ.update(launch.environment())
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(launch.free_port()))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    loaded = load(recipe)
    for name in loaded.order():
        state = chain.state(loaded, name, folder)
        print(f"{name}  {state.why}", flush=True)
        if not state.done:
            stage.execute(program(loaded.stages[name].kind), str(recipe), name, folder, [], 0, 1)
            AcceleratorState._reset_state()
            PartialState._reset_state()


def program(kind: str) -> Any:
    """The function that a stage's module runs."""
    module = KINDS[kind].module
    package = find_spec(module)
    module += ".__main__" if package is not None and package.submodule_search_locations else ""
    return getattr(import_module(module), kind)


# ---------------------------------------------------------------- page


def page(run: Path, seeds: list[int], made: dict[int, Made], seconds: float) -> str:
    """What is in the sets, what the trainings on them reach, and how far they are apart prompt by prompt."""
    rows = len(made[seeds[0]].kinds)
    lines = [
        "# Selection on a noisy set",
        "",
        "`python scripts/bench_selection.py --out docs/results/selection.md`, "
        f"{measured_on('torch', 'transformers', 'peft', 'deepspeed')}; {seconds / 60:.1f} minutes in all.",
        "",
        f"The quickstart's {rows} training demonstrations, each spoilt with probability {NOISY:g}: another prompt's reply, a",
        "wrong place, the first third of the reply, words in no order, or a copy of one of "
        f"{COPIED} rows. Selected: a tenth by MoDS,",
        f"half of it as the seed set; quality keeps {KEEP:.0%}, necessity half of that; one reward model, from the shipped",
        "comparisons. Random: a tenth by chance. Full: all rows. LoRA fine-tuning of the quickstart's base, "
        f"{EPOCHS} epochs each. Loss is",
        "that of the clean held-out demonstrations, the rule's score (0 to 3) that of sampled replies to held-out prompts. The",
        "reward model knows the rule well: what it selects is cleaner, and the better part of what is clean. A copy counts as",
        "spoilt, though the first of its kind does no harm.",
        "",
        "| set | seed | rows | unspoilt | vivid words a reply | held-out loss | rule's score |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        for name in SETS:
            lines.append(f"| {name} | {seed} | " + " | ".join(measured(run, name, seed, made[seed])) + " |")
    lines += [
        "",
        "| selected less | seed | held-out loss | rule's score, prompt by prompt (95 % interval) |",
        "|---|---|---|---|",
    ]
    for other in SETS[1:]:
        for seed in seeds:
            apart = loss(run, "selected", seed) - loss(run, other, seed)
            lines.append(f"| {other} | {seed} | {apart:+.3f} | {difference(run / f'{other}{seed}')} |")
    return "\n".join(lines) + "\n"


def measured(run: Path, name: str, seed: int, made: Made) -> list[str]:
    """Rows, share of unspoilt ones, vivid words, loss, score."""
    noisy = read(run.parent / f"noisy{seed}.jsonl")
    numbers = list(range(len(noisy)))
    if name == "selected":
        scores = parquet.read_table(run / f"select{seed}" / "output" / "scores.parquet").to_pylist()
        numbers = [row["row"] - 1 for row in scores if row["verdict"].startswith("chosen")]
    if name == "random":
        numbers = made.chance
    vivid = sum(word.strip(".,") in VIVID for n in numbers for word in noisy[n]["completion"].split(" ")) / len(numbers)
    clean = sum(made.kinds[number] == "clean" for number in numbers) / len(numbers)
    other = "random" if name == "selected" else name
    side = "model" if name == "selected" else "against"
    score = handoff.open_baton(run / f"{other}{seed}").manifest["metrics"][f"judge/{side}"]
    return [str(len(numbers)), f"{clean:.0%}", f"{vivid:.2f}", f"{loss(run, name, seed):.3f}", f"{score:.3f}"]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def loss(run: Path, name: str, seed: int) -> float:
    return float(handoff.open_baton(run / f"sft_{name}{seed}").manifest["metrics"]["held_out/loss"])


def difference(comparison: Path) -> str:
    """The mean difference of the rule's scores over the prompts, with its 95 % interval by the normal distribution."""
    rows = read(comparison / "output" / "samples.jsonl")
    apart = [rule_score(row["prompt"], row["after"]) - rule_score(row["prompt"], row["before"]) for row in rows]
    mean = sum(apart) / len(apart)
    error = math.sqrt(sum((value - mean) ** 2 for value in apart) / (len(apart) - 1) / len(apart))
    return f"{mean:+.3f} ({mean - 1.96 * error:+.3f} to {mean + 1.96 * error:+.3f})"


if __name__ == "__main__":
    main()
