"""Rows per second of reading, cleaning, deduplicating and tokenising, from 10,000 short rows to a million, and the memory.

python scripts/bench_data.py                     # writes docs/results/data.md; RELAY_TEST_DATA is the folder of real texts
python scripts/bench_data.py --rows 10000        # a quick look, printed only

Rows are made of sentences of real books and dialogues, put together anew in every row so that n-grams vary; one in twenty is
another row again, one in twenty another with a few words changed, one in twenty has markup and broken Unicode. Every
measurement is a process of its own: seconds from the first row to the last file, with the processes that it starts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
BASE = ROOT / "pipeline" / "recipes" / "quickstart" / "base"
OUT = ROOT / "docs" / "results" / "data.md"
SIZES = (10_000, 100_000, 1_000_000)
STEPS: dict[str, list[Any]] = {
    "clean": ["unicode", "control", "html", "whitespace"],
    "mask": ["mask"],
    "language": [{"language": {"keep": ["en"]}}],
    "exact duplicates": ["exact_duplicates"],
    "near duplicates": [{"near_duplicates": {"threshold": 0.8}}],
    "decontaminate": [{"decontaminate": {"against": "$RELAY_TEST_DATA/gsm8k/test.jsonl.gz"}}],
}
STEPS["all of them"] = [step for steps in STEPS.values() for step in steps]


def read(folder: Path) -> None:
    """Rows as the reader gives them, and nothing else."""
    from pipeline.data.read import rows

    for _ in rows(str(folder / "rows.jsonl")):
        pass


def prepare(steps: list[Any]) -> Callable[[Path], None]:
    """A prepare stage with `steps`, from reading to publishing."""

    def run(folder: Path) -> None:
        from pipeline.stage import execute
        from stages.prepare import prepare as stage

        recipe = folder / "recipe.yaml"
        block = {"kind": "prepare", "data": [{"path": "rows.jsonl"}], "steps": steps}
        text = {"name": "bench", "base": {"model": "none"}, "stages": {"clean": block}}
        recipe.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=folder) as run_dir:
            execute(stage, str(recipe), "clean", Path(run_dir), [], 0, 1)

    return run


def tokenise(folder: Path) -> None:
    """Rows as an SFT stage has them: read, placed, encoded with the quickstart's tokenizer, written to disk."""
    from transformers import AutoTokenizer

    from pipeline.config.recipe import load
    from pipeline.data.encoded import demonstrations
    from pipeline.data.split import fingerprints
    from pipeline.stage import Context

    recipe = folder / "recipe.yaml"
    block = {"kind": "sft", "data": [{"path": "rows.jsonl"}], "lr": 1e-4}
    text = {"name": "bench", "base": {"model": str(BASE)}, "stages": {"sft": block}}
    recipe.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    loaded, tok = load(recipe), AutoTokenizer.from_pretrained(BASE)
    inputs = {"data": fingerprints(loaded, "sft", {}), "parents": {}}
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        context = Context(loaded, "sft", Path(run_dir), 0, 1, inputs, {})
        data = demonstrations(context, tok, 512, "completion")
        counts = data.counts["rows.jsonl"]
        assert counts["rows"] == counts["used"] + counts["held out"] + counts["too long"], counts


TASKS: dict[str, Callable[[Path], None]] = {"read": read} | {name: prepare(steps) for name, steps in STEPS.items()}
TASKS["tokenise"] = tokenise
"""What is measured: a function of the folder that holds rows.jsonl."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--one", choices=list(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(TASKS[arguments.one], arguments.folder)))
        return
    found: dict[str, dict[int, dict[str, float]]] = {task: {} for task in arguments.tasks}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name), rows)
            for task in arguments.tasks:
                found[task][rows] = in_own_process(task, Path(name))
                print(task, rows, found[task][rows], flush=True)
    text = page(found, arguments.rows)
    print(text)
    if tuple(arguments.rows) == SIZES:
        OUT.write_text(text, encoding="utf-8")


def in_own_process(task: str, folder: Path) -> dict[str, float]:
    line = [sys.executable, __file__, "--one", task, "--folder", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(task: Callable[[Path], None], folder: Path) -> dict[str, float]:
    """Seconds; peak resident MiB of this process, and of the largest that it started."""
    if task is tokenise:
        import pipeline.data.encoded  # noqa: F401  torch and more: a rank has it before it reads any data
    began = time.perf_counter()
    task(folder)
    seconds = time.perf_counter() - began
    peak, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "peak": peak, "child": child}


def write_rows(folder: Path, count: int) -> None:
    """rows.jsonl: `count` rows of a prompt and a completion, about 50 words in all."""
    pool, draw = sentences(), random.Random(0)
    recent: list[dict[str, str]] = []
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(count):
            chance = draw.random()
            if recent and chance < 0.1:
                row = dict(draw.choice(recent))
                row["completion"] = row["completion"] if chance < 0.05 else near(row["completion"], draw)
            else:
                row = {"prompt": draw.choice(pool), "completion": " ".join(draw.choices(pool, k=2))}
            if chance > 0.95:
                row["completion"] = f"<p>{row['completion']}</p> <b>cafÃ©</b>\u200b &amp; more"
            recent = [*recent[-999:], row]
            stream.write(json.dumps(row) + "\n")


def near(text: str, draw: random.Random) -> str:
    """`text` with its last word another: one or a few 5-grams of many."""
    return " ".join([*text.split()[:-1], f"word{draw.randrange(1000)}"])


def sentences() -> list[str]:
    """Sentences of 8 to 30 words."""
    data = Path(os.environ.setdefault("RELAY_TEST_DATA", str(ROOT.parent / "shared" / "data")))
    texts = [file.read_text(encoding="utf-8") for file in sorted(data.glob("gutenberg/*.txt"))]
    for file in sorted(data.glob("hh-rlhf/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            texts += [json.loads(line)["chosen"] for line in stream]
    found = {" ".join(s.split()) for text in texts for s in re.split(r"(?<=[.!?])\s|\n\n", text)}
    pool = sorted(s for s in found if 8 <= len(s.split()) <= 30)
    if not pool:
        raise SystemExit(f"no texts in {data}; set RELAY_TEST_DATA")
    return pool


def page(found: dict[str, dict[int, dict[str, float]]], sizes: list[int]) -> str:
    from scripts.compare_trl import commit

    head = " | ".join(f"{rows:,} rows, rows/s" for rows in sizes)
    lines = [
        "# Data: rows per second and memory",
        "",
        f"`python scripts/bench_data.py`, Python {platform.python_version()}, {os.cpu_count()} cores. Commit {commit()}.",
        "",
        "Rows of a prompt and a completion, about 50 words, made of real sentences. `read` gives rows and nothing else;",
        "`tokenise` is what an SFT stage does before it trains, from reading to token ids on disk (quickstart's tokenizer);",
        "each other line is a whole prepare stage with only those steps, from reading JSON lines to publishing Parquet.",
        "`linear`: the time of the most rows over that of ten times fewer, divided by ten: 1 is linear, more is worse. Peaks",
        "are of the stage's process (of `tokenise` some 440 MiB are torch and its like) and of the largest of its workers.",
        "",
        f"| | {head} | linear | peak, MiB | a worker's, MiB |",
        "|---|" + "---:|" * (len(sizes) + 3),
    ]
    for task, by_size in found.items():
        rates = " | ".join(f"{rows / by_size[rows]['seconds']:,.0f}" for rows in sizes)
        most = sizes[-1]
        tenth = by_size.get(most // 10)
        linear = f"{by_size[most]['seconds'] / tenth['seconds'] / 10:.2f}" if tenth else ""
        lines.append(f"| {task} | {rates} | {linear} | {by_size[most]['peak']:,.0f} | {by_size[most]['child']:,.0f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
