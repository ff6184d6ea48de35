"""How fast rows become token ids on disk, and in how much memory: rows per second and peak resident memory by number of rows.

python scripts/bench_tokenise.py                      # 10k, 100k and 1M rows; prints a table
python scripts/bench_tokenise.py 1000 5000

Rows of about 40 words are made by a seed and written as JSONL; each size is then read, placed, encoded and written by a fresh
process as a stage does it (`pipeline.data.encoded`), workers included. `measure` is for other benchmarks to call.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "pipeline" / "recipes" / "quickstart" / "base"
SIZES = (10_000, 100_000, 1_000_000)
TEXT = """
the a of to and in that it is was for on are with as at be this have from or had by but what some we can out other
were all there when up use your how said an each she which do their time if will way about many then them write would
like so these her long make thing see him two has look more day could go come did number sound no most people my over
know water than call first who may down side been now find
"""
WORDS = TEXT.split()


def measure(rows: int) -> dict[str, float]:
    """Tokenise so many rows in a process of its own.

    rows, seconds, rows_per_second; then in MiB of resident memory: `before` (the rank once everything is imported), `peak`
    (the rank's highest), `worker_peak` (the highest of a worker, pages it shares with the rank included; 0 without workers).
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "rows.jsonl", rows)
        command = [sys.executable, str(Path(__file__).resolve()), "--in", folder]
        env = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write(path: Path, rows: int) -> None:
    """Rows of a prompt of 8 to 24 words, all different, and a reply of 8 to 40."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            prompt = " ".join(chance.choices(WORDS, k=chance.randint(8, 24)))
            reply = " ".join(chance.choices(WORDS, k=chance.randint(8, 40)))
            stream.write(json.dumps({"prompt": f"{number} {prompt}", "completion": f" {reply}"}) + "\n")


def encode(folder: Path) -> dict[str, Any]:
    """Encode `rows.jsonl` of the folder in this process."""
    from transformers import AutoTokenizer

    from pipeline.config.recipe import load
    from pipeline.data.encoded import demonstrations
    from pipeline.data.split import fingerprints
    from pipeline.stage import Context

    recipe = {
        "name": "tokenise",
        "base": {"model": str(BASE)},
        "stages": {"sft": {"kind": "sft", "data": [{"path": "rows.jsonl"}], "lr": 1e-4}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded, tok = load(folder / "recipe.yaml"), AutoTokenizer.from_pretrained(BASE)
    inputs = {"data": fingerprints(loaded, "sft", {}), "parents": {}}
    before = peak(resource.RUSAGE_SELF)
    began = time.monotonic()
    data = demonstrations(Context(loaded, "sft", folder / "run", 0, 1, inputs, {}), tok, 512, "completion")
    seconds = time.monotonic() - began
    tops = peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)
    rows = data.counts["rows.jsonl"]["rows"]
    assert rows == len(data.train) + len(data.held_out), f"rows were left out: {data.counts}"
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_second": round(rows / seconds, 1),
        "before": before,
        "peak": tops[0],
        "worker_peak": tops[1],
    }


def peak(who: int) -> float:
    """Highest resident memory so far, MiB."""
    return round(resource.getrusage(who).ru_maxrss / 1024, 1)


def table(found: list[dict[str, float]]) -> str:
    lines = [
        "| rows | s | rows/s | rank before, MiB | rank's peak, MiB | a worker's peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        shown = f"{row['rows']:,.0f} | {row['seconds']:.1f} | {row['rows_per_second']:,.0f} | {row['before']:.0f}"
        lines.append(f"| {shown} | {row['peak']:.0f} | {row['worker_peak']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        print(json.dumps(encode(Path(sys.argv[2]))))
    else:
        print(table([measure(int(size)) for size in sys.argv[1:] or SIZES]))
