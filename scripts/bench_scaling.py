"""Time of a PPO update as batch, reply length and ranks double: is it linear?

python scripts/bench_scaling.py        # writes docs/results/bench_scaling.md

One thread a rank, a random 15M Llama in float32, all sizes in turns. Doubling the batch or the reply should double the time;
doubling the ranks, each with as many rows as before, should leave it. What two cores take from each other is told by two runs
of one rank at the same time, which have nothing to do with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(HERE.parent)]

import shapes  # noqa: E402
from turns import Side  # noqa: E402

from pipeline.launch import free_port  # noqa: E402
from scripts.bench_ppo import PARTS, recipe  # noqa: E402
from scripts.compare_trl import SETTINGS, commit  # noqa: E402


@dataclass(frozen=True)
class Size:
    """One size of update; `batch` counts the rows of all ranks. `apart` are two runs of it at once."""

    name: str
    batch: int = 16
    response: int = 96
    ranks: int = 1
    ideal: float = 1.0
    apart: bool = False


SIZES = (
    Size("16 rows of 32+96 tokens on one rank"),
    Size("twice the rows", batch=32, ideal=2.0),
    Size("four times the rows", batch=64, ideal=4.0),
    Size("twice the reply", response=192, ideal=(32 + 192) / (32 + 96)),
    Size("twice the ranks, rows each as before", batch=32, ranks=2),
    Size("two runs of the first at once", apart=True),
)


class Job:
    """The ranks of one size; `turn` lets all of them do one update."""

    def __init__(self, size: Size, work: Path, base: Path, turns: int) -> None:
        work.mkdir()
        prompts = shapes.prompts(work, size.batch * (turns + 2), 32, shapes.SHAPES["llama-15m"]().vocab_size)
        settings = SETTINGS | {
            "base": str(base),
            "prompts": str(prompts),
            "batch": size.batch,
            "micro_batch": 8,
            "epochs": 1,
            "steps": turns + 2,
            "prompt_tokens": 32,
            "response_tokens": size.response,
            "lr": 1e-6,
            "dtype": "float32",
        }
        described = recipe(settings)
        described["deepspeed"]["num_gpus"] = size.ranks
        (work / "recipe.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
        shared = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        shared |= {"WORLD_SIZE": str(size.ranks), "LOCAL_WORLD_SIZE": str(size.ranks)}
        shared |= {"PYTHONPATH": os.pathsep.join([str(PARTS), str(HERE.parent)]), "MASTER_ADDR": "127.0.0.1"}
        self.sides = []
        for run in range(2 if size.apart else 1):
            command = [sys.executable, str(PARTS / "relay_side.py"), str(work / "recipe.yaml"), str(work / f"run{run}")]
            port = {"MASTER_PORT": str(free_port())}
            for rank in range(size.ranks):
                own = shared | port | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.sides.append(Side(f"run {run}, rank {rank}", command, work / f"{run}-{rank}.log", own))

    def turn(self) -> dict[str, Any]:
        """The slowest rank's facts."""
        with ThreadPoolExecutor(len(self.sides)) as pool:
            return max(pool.map(lambda side: side.turn(), self.sides), key=lambda turn: float(turn["seconds"]))

    def close(self) -> None:
        for side in self.sides:
            side.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=4, help="updates of each size that count, after one that does not")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "bench_scaling.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shapes.write(work / "base", "llama-15m")
        jobs = [Job(size, work / str(number), work / "base", arguments.turns) for number, size in enumerate(SIZES)]
        seconds: list[list[float]] = [[] for _ in SIZES]
        try:
            for number in range(arguments.turns + 1):
                for job, found in zip(jobs, seconds, strict=True):
                    turn = job.turn()
                    if number:
                        found.append(turn["seconds"])
                print(json.dumps([round(found[-1], 2) for found in seconds if found]), flush=True)
        finally:
            for job in jobs:
                job.close()
    text = page(seconds)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def page(seconds: list[list[float]]) -> str:
    first = statistics.median(seconds[0])
    lines = [
        "# Time of a PPO update as it grows",
        "",
        f"`python scripts/bench_scaling.py`, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores. "
        f"Commit {commit()}.",
        "",
        (__doc__ or "").split("\n\n")[-1].replace("\n", " ").strip(),
        "",
        "| size | seconds, median (least to most) | of the first | linear | off linear |",
        "|---|---|---|---|---|",
    ]
    for size, found in zip(SIZES, seconds, strict=True):
        ratio = statistics.median(found) / first
        lines.append(
            f"| {size.name} | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) | {ratio:.2f} "
            f"| {size.ideal:.2f} | {100 * (ratio / size.ideal - 1):+.0f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
