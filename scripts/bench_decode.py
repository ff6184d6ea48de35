"""Decoding alone: Relay's engine beside Hugging Face's `generate`, and a step beside what the memory's bandwidth allows.

python scripts/bench_decode.py        # engines in turns on a random 15M Llama; writes docs/results/bench_decode.md
python scripts/bench_decode.py --shape llama-1b --dtype bfloat16 --batch 64 --limit     # a step against the bandwidth

A step cannot be faster than reading the weights and the keys and values once; `--limit` measures the device's copy
bandwidth (bytes read and written) in the same run and prints how much of it a step attains.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(HERE.parent)]

import shapes  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from pipeline.adapters import build  # noqa: E402
from pipeline.config.schema import Adapter, Sampling  # noqa: E402
from pipeline.generation import engines, static  # noqa: E402
from pipeline.generation.rollout import keys  # noqa: E402
from pipeline.generation.whole import Whole  # noqa: E402
from scripts.compare_trl import commit  # noqa: E402

OUT = HERE.parent / "docs" / "results" / "bench_decode.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="llama-15m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--response", type=int, default=96)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--limit", action="store_true", help="a step against the bandwidth, in place of the engines")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.limit:
        print(limit(arguments, device))
        return
    rows = [row for ends in (0.0, 0.4) for row in compared(arguments, device, ends)]
    head = [
        "# Rollouts by engine",
        "",
        f"`python scripts/bench_decode.py`, Python {platform.python_version()}, torch {torch.__version__}, {where(device)}. "
        f"Commit {commit()}.",
        "",
        f"{arguments.shape}, {arguments.dtype}, LoRA r=8 on every linear layer, {4 * arguments.batch} prompts of "
        f"{arguments.prompt} tokens, {arguments.batch} at a time, replies of up to {arguments.response} tokens; all engines in "
        "turns in one process, the first turn left out, medians; the ratio's spread is over the turns. `merged` is the copy "
        "with the adapter in its weights, its making included.",
        "",
        "| mean reply | engine | adapter | seconds | tokens/s | hf unmerged / this |",
        "|---|---|---|---|---|---|",
    ]
    text = "\n".join([*head, *rows]) + "\n"
    print(text)
    OUT.write_text(text, encoding="utf-8")


def policy(arguments: argparse.Namespace, device: torch.device, ends: float) -> Any:
    """A random model with a fresh adapter on every linear layer, as PEFT holds it."""
    share = shapes.end_share(arguments.response, ends * arguments.response) if ends else 0.0
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        shapes.write(Path(folder), arguments.shape, ends=share, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return build.attach(model, Adapter(r=8, alpha=16), "CAUSAL_LM").to(device).eval()


def compared(arguments: argparse.Namespace, device: torch.device, ends: float) -> list[str]:
    """Table rows of every engine, with and without a merged copy."""
    model = policy(arguments, device, ends).get_base_model()
    whole = Whole(model)
    count, vocabulary = 4 * arguments.batch, model.config.vocab_size
    draw = torch.Generator().manual_seed(3)
    prompts = torch.randint(shapes.FIRST, vocabulary, (count, arguments.prompt), generator=draw).tolist()
    noise = keys(0, 0, torch.arange(count), torch.zeros(count, dtype=torch.int64)).to(device)
    sampling = Sampling(max_response_length=arguments.response, batch=arguments.batch)

    def run(engine: str, merged: bool) -> int:
        asked = (prompts, noise, sampling)
        if not merged:
            found = engines.sample(engine, model, *asked, pad=shapes.PAD, eos=[shapes.EOS])
        else:
            with whole.of("default", sharded=False) as copy:
                found = engines.sample(engine, copy, *asked, pad=shapes.PAD, eos=[shapes.EOS])
        return int(found.lengths.sum())

    ways = [(engine, merged) for engine in ("hf", "static") for merged in (False, True)]
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    tokens = 0
    for turn in range(arguments.turns + 1):
        for way in ways:
            spent, tokens = timed(lambda way=way: run(*way), device)  # type: ignore[misc]
            if turn:
                seconds[way].append(spent)
    rows = []
    for way in ways:
        middle = statistics.median(seconds[way])
        ratios = sorted(a / b for a, b in zip(seconds["hf", False], seconds[way], strict=True))
        ratio = statistics.median(seconds["hf", False]) / middle
        rows.append(
            f"| {tokens / count:.1f} | {way[0]} | {'merged' if way[1] else 'unmerged'} | {middle:.2f} "
            f"| {tokens / middle:,.0f} | {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    return rows


def limit(arguments: argparse.Namespace, device: torch.device) -> str:
    """Seconds of a decode step, and the share of the copy bandwidth that its weights and cache attain."""
    model = policy(arguments, device, 0.0).get_base_model()
    prompts = torch.randint(shapes.FIRST, model.config.vocab_size, (arguments.batch, arguments.prompt)).tolist()

    noise = keys(0, 0, torch.arange(arguments.batch), torch.zeros(arguments.batch, dtype=torch.int64)).to(device)
    with Whole(model).of("default", sharded=False) as copy:
        size = sum(p.numel() * p.element_size() for p in {id(p): p for p in copy.parameters()}.values())
        if copy.config.tie_word_embeddings is False:  # of untied input embeddings a step reads its tokens' rows alone
            size -= copy.get_input_embeddings().weight.numel() * copy.get_input_embeddings().weight.element_size()
        sampling = Sampling(max_response_length=arguments.response, batch=arguments.batch)
        steps = []
        for _ in range(arguments.turns):
            run = static._Run(copy, prompts, noise, sampling, [], arguments.batch, synced=False)
            run.admit()
            # Those of the second half, whose median is no step that captures a graph.
            every = [timed(run.step, device)[0] for _ in range(arguments.response - 1)]
            steps += every[arguments.response // 2 :]
    step = statistics.median(steps)
    config = copy.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = arguments.prompt + 0.75 * arguments.response
    cache = (
        2 * config.num_hidden_layers * heads * head * width * arguments.batch * next(copy.parameters()).element_size()
    )
    speed = bandwidth(device)
    share = (size + cache) / speed / step
    return (
        f"{arguments.shape}, {arguments.dtype}, batch {arguments.batch}, {arguments.prompt}+{arguments.response}, "
        f"{where(device)}: {1000 * step:.3f} ms a step; weights {size / 2**20:.0f} MiB, keys and values "
        f"{cache / 2**20:.0f} MiB; copy bandwidth {speed / 1e9:.0f} GB/s; {100 * share:.0f} % of the limit"
    )


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy much larger than the caches."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(timed(lambda: target.copy_(source), device)[0] for _ in range(10))
    return 2 * source.numel() * source.element_size() / best


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
