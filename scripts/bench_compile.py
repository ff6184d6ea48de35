"""Whether `torch.compile` pays in PPO's update: forward and backward passes of micro-batches as they come, compiled or not.

python scripts/bench_compile.py        # a random 15M Llama with LoRA; writes docs/results/bench_compile.md

Micro-batches have the shapes of natural lengths: few repeat, so that what is compiled must hold for any (`dynamic`) or is
compiled anew for each. Both sides take turns in one process; the seconds that compiling took are told beside.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(HERE.parent)]

import shapes  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from pipeline.adapters import build  # noqa: E402
from pipeline.config.schema import Adapter  # noqa: E402
from scripts.compare_trl import commit  # noqa: E402

OUT = HERE.parent / "docs" / "results" / "bench_compile.md"
SHAPES = ((8, 128), (10, 96), (14, 71), (17, 58), (9, 112), (12, 83))
"""(rows, tokens) of the micro-batches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="llama-15m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = policy(arguments, device)
    draw = torch.Generator().manual_seed(3)
    batches = [
        torch.randint(shapes.FIRST, model.config.vocab_size, shape, generator=draw).to(device) for shape in SHAPES
    ]
    backbone = model.get_base_model().base_model
    ways = {"as written": backbone, "compiled": torch.compile(backbone, dynamic=True)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, float] = {}
    for turn in range(arguments.turns + 1):
        for name, call in ways.items():
            spent = update(call, batches, device)
            if turn:
                seconds[name].append(spent)
            else:
                first[name] = spent
    text = page(arguments, device, seconds, first)
    print(text)
    OUT.write_text(text, encoding="utf-8")


def policy(arguments: argparse.Namespace, device: torch.device) -> Any:
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        shapes.write(Path(folder), arguments.shape, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return build.attach(model, Adapter(r=8, alpha=16), "CAUSAL_LM").to(device).train()


def update(call: Any, batches: list[torch.Tensor], device: torch.device) -> float:
    """Seconds of a forward and a backward pass over every micro-batch."""
    began = time.perf_counter()
    for ids in batches:
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        call(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def page(
    arguments: argparse.Namespace, device: torch.device, seconds: dict[str, list[float]], first: dict[str, float]
) -> str:
    plain, compiled = (statistics.median(seconds[name]) for name in ("as written", "compiled"))
    ratios = sorted(a / b for a, b in zip(seconds["as written"], seconds["compiled"], strict=True))
    extra = first["compiled"] - compiled
    saved = plain - compiled
    pays = f"repaid after {extra / saved:,.0f} such updates" if saved > 0 else "never repaid"
    return "\n".join(
        [
            "# torch.compile in PPO's update",
            "",
            f"`python scripts/bench_compile.py`, Python {platform.python_version()}, torch {torch.__version__}, "
            f"{device.type}, {os.cpu_count()} cores. Commit {commit()}.",
            "",
            f"{arguments.shape}, {arguments.dtype}, LoRA r=8 on every linear layer; {len(SHAPES)} micro-batches of "
            "unlike shapes, forward and backward through the blocks, medians of turns.",
            "",
            "| as written, s | compiled, s | as written / compiled | compiling took, s | |",
            "|---|---|---|---|---|",
            f"| {plain:.2f} | {compiled:.2f} | {plain / compiled:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {extra:.0f} | {pays} |",
            "",
        ]
    )


if __name__ == "__main__":
    main()
