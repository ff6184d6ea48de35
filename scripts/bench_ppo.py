"""A PPO update of Relay beside one of TRL 1.12: time and peak memory, on the CPU or one GPU, both sides in turns.

python scripts/bench_ppo.py                       # every row; writes docs/results/bench_ppo.md
python scripts/bench_ppo.py --rows natural        # one of them, printed only

Random weights in a published shape, float32 (bfloat16 on a GPU), LoRA on every linear layer, a rule for the reward, one PPO
epoch, one minibatch. TRL 1.12 is installed into a directory of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(HERE.parent)]

import shapes  # noqa: E402
import torch  # noqa: E402
from turns import Side  # noqa: E402

from scripts.compare_trl import SETTINGS, TRL, TRL_FOLDER, commit, install  # noqa: E402

PARTS = HERE / "bench"
TARGETS = ["down_proj", "fc1", "fc2", "gate_proj", "k_proj", "o_proj", "out_proj", "q_proj", "up_proj", "v_proj"]


@dataclass(frozen=True)
class Row:
    """One comparison. `ends`: mean response length as a share of the limit, 0 where no response may end. `rollout`: rows that
    are sampled at a time; all of them are fastest, few take least memory. `mapped`: bytes from which glibc returns memory."""

    shape: str
    ends: float = 0.0
    batch: int = 32
    prompt: int = 32
    response: int = 96
    micro: int = 8
    rollout: int = 32
    mapped: int | None = None
    dtype: str = "float32"
    turns: int = 5


ROWS = {
    "fixed": Row("llama-15m"),
    "natural": Row("llama-15m", ends=0.4),
    "memory": Row("llama-120m", rollout=8, mapped=2**20, turns=1),
    "gpu-opt": Row("opt-1.3b", batch=64, rollout=64, prompt=256, response=256, dtype="bfloat16", turns=3),
    "gpu-llama": Row("llama-1b", batch=64, rollout=64, prompt=256, response=256, dtype="bfloat16", turns=3),
}
CPU_ROWS = ("fixed", "natural", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=None, help="default: all for this machine")
    parser.add_argument("--sides", nargs="+", choices=["relay", "trl"], default=["relay", "trl"])
    parser.add_argument("--turns", type=int, help="updates a side that count, after one that does not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl", type=Path, default=Path("runs/compare_trl"), help="where TRL 1.12 is, or will be")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of Relay's stage `ppo`")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    names = arguments.rows or (list(CPU_ROWS) if not torch.cuda.is_available() else ["gpu-opt", "gpu-llama"])
    trl = arguments.trl.resolve() / TRL_FOLDER
    if "trl" in arguments.sides:
        install(trl)
    lines = []
    for name in names:
        row = ROWS[name] if arguments.turns is None else replace(ROWS[name], turns=arguments.turns)
        with tempfile.TemporaryDirectory() as work:
            found = measure(row, Path(work), arguments.sides, trl, arguments.threads, arguments.set)
        for side, turns in found.items():
            print(f"{name} {side}: " + "  ".join(summary(turn) for turn in turns), flush=True)
        if len(found) == 2:
            lines.append(line(name, row, found))
            print(lines[-1], flush=True)
    out = arguments.out or (HERE.parent / "docs" / "results" / "bench_ppo.md" if arguments.rows is None else None)
    if out is not None and len(lines) == len(names):
        out.write_text(page(lines, arguments.threads), encoding="utf-8")


def measure(
    row: Row, work: Path, sides: list[str], trl: Path, threads: int, overrides: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Facts of each side's updates, one side after the other, without the first."""
    base = work / "base"
    share = shapes.end_share(row.response, row.ends * row.response) if row.ends else 0.0
    shapes.write(base, row.shape, ends=share, dtype=getattr(torch, row.dtype))
    vocabulary = shapes.SHAPES[row.shape]().vocab_size
    prompts = shapes.prompts(work, row.batch * (row.turns + 2), row.prompt, vocabulary)
    config = shapes.SHAPES[row.shape]().model_type
    targets = [t for t in TARGETS if t not in (("fc1", "fc2", "out_proj") if config == "llama" else ("down_proj",))]
    targets = [t for t in targets if config == "llama" or t not in ("gate_proj", "o_proj", "up_proj")]
    settings = SETTINGS | {
        "base": str(base),
        "prompts": str(prompts),
        "work": str(work),
        "batch": row.batch,
        "micro_batch": row.micro,
        "rollout": row.rollout,
        "epochs": 1,
        "steps": row.turns + 2,
        "prompt_tokens": row.prompt,
        "response_tokens": row.response,
        "lr": 1e-6,
        "targets": targets,
        "dtype": row.dtype,
        "threads": threads,
    }
    (work / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe(settings)), encoding="utf-8")
    paths = [str(PARTS), str(HERE / "compare_trl"), str(HERE.parent)]
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sets = [part for item in overrides for part in ("--set", f"stages.ppo.{item}")]
    commands = {
        "relay": [str(PARTS / "relay_side.py"), str(work / "recipe.yaml"), str(work / "run"), *sets],
        "trl": [str(PARTS / "trl_side.py"), str(work / "settings.json")],
    }
    running = []
    try:
        for side in sides:
            ahead = [str(trl)] if side == "trl" else []
            own = env | {"PYTHONPATH": os.pathsep.join([*ahead, *paths])}
            own |= {"MALLOC_MMAP_THRESHOLD_": str(row.mapped)} if row.mapped else {}
            running.append(Side(side, [sys.executable, *commands[side]], work / f"{side}.log", own))
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(row.turns + 1):
            for side in running:
                turn = side.turn()
                if number:
                    found[side.name].append(turn)
    finally:
        for side in running:
            side.close()
    return found


def recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a Relay recipe; what they do not say is the recipe's default."""
    ppo = {
        "kind": "ppo",
        "policy": "base",
        "reward": [{"function": "shapes:rule"}],
        "critic": {"init": "policy"},
        "prompts": [{"path": settings["prompts"]}],
        "steps": settings["steps"],
        "rollout_batch": settings["batch"],
        "micro_batch": settings["micro_batch"],
        "lr": settings["lr"],
        "lr_schedule": "constant",
        "warmup": 0,
        "max_grad_norm": 0.0,
        "sampling": {
            "max_prompt_length": settings["prompt_tokens"],
            "max_response_length": settings["response_tokens"],
            "batch": settings.get("rollout", settings["batch"]),
        },
    }
    adapter = {"method": "lora", "r": settings["r"], "alpha": settings["alpha"], "targets": settings["targets"]}
    return {
        "name": "bench",
        "base": {"model": settings["base"], "dtype": {"float32": "fp32", "bfloat16": "bf16"}[settings["dtype"]]},
        "adapter": adapter,
        "deepspeed": {"config": "zero0", "num_gpus": 1},
        "data": {"holdout": 0.0},
        "stages": {"ppo": ppo},
    }


def summary(turn: dict[str, Any]) -> str:
    phases = " ".join(f"{name} {seconds:.2f}" for name, seconds in turn.get("phases", {}).items())
    return f"{turn['seconds']:.2f} s" + (f" ({phases}; {turn['length']:.0f} tokens)" if phases else "")


def line(name: str, row: Row, found: dict[str, list[dict[str, Any]]]) -> str:
    """A table row: seconds and MiB of both sides, and their ratios."""
    ours, theirs = ([turn["seconds"] for turn in found[side]] for side in ("relay", "trl"))
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    memory = [max(turn["peak_mib"] for turn in found[side]) for side in ("relay", "trl")]
    length, padding = (statistics.mean(turn[key] for turn in found["relay"]) for key in ("length", "padding"))
    cells = [
        name,
        f"{row.shape}, {row.dtype}, {row.batch} x ({row.prompt}+{row.response})",
        f"{length:.1f}",
        f"{statistics.median(ours):.2f}",
        f"{statistics.median(theirs):.2f}",
        f"**{statistics.median(theirs) / statistics.median(ours):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{memory[0]:.0f}",
        f"{memory[1]:.0f}",
        f"**{memory[0] / memory[1]:.2f}**",
        f"{100 * padding:.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def page(lines: list[str], threads: int) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "deepspeed"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {threads} threads"
    head = (
        "# A PPO update beside TRL 1.12's",
        "",
        f"`python scripts/bench_ppo.py`, Python {platform.python_version()}, {libraries}; {TRL} in a directory of its own. "
        f"{device}. Commit {commit()}.",
        "",
        (__doc__ or "").split("\n\n")[-1].replace("\n", " ").strip()
        + " Each side is a process; they update in turns, the "
        "first update of each is left out, times are medians, the spread is that of the turns' ratios. Peak memory is the "
        "process's, libraries included. Both sample all rows at once, in the row `memory` 8 at a time; TRL scores as many "
        "at once, Relay scores, and both train, in micro-batches of 8 rows. In the row `memory` both run under "
        "MALLOC_MMAP_THRESHOLD_=1048576: glibc then gives freed memory back, which it otherwise keeps, and takes longer.",
        "",
        "| row | shape | reply, tokens | Relay, s | TRL, s | TRL / Relay | Relay, MiB | TRL, MiB | Relay / TRL | padding |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    main()
