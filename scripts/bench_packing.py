"""What packing gains: real tokens per second of forward and backward passes over the same rows, packed and not.

python scripts/bench_packing.py                       # HH-RLHF's chosen replies, a random 15M Llama with LoRA
python scripts/bench_packing.py --data FILE --rows 64 --turns 1 --print

Both sides take turns in one process. A micro-batch of rows is padded to its longest, as TRL does; packed, it holds as many
sequences of `--max-length` as give about as many real tokens. That both learn the same is checked: the mean loss over all
target tokens must agree. Writes docs/results/packing.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(HERE.parent)]

import shapes  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from pipeline.adapters import build  # noqa: E402
from pipeline.config.schema import Adapter  # noqa: E402
from pipeline.data import encode, read  # noqa: E402
from pipeline.data.packed import Collator  # noqa: E402
from pipeline.data.shape import Skip, demonstration  # noqa: E402
from scripts.compare_trl import commit  # noqa: E402

DATA = Path(os.environ.get("RELAY_TEST_DATA", HERE.parent.parent / "shared" / "data"))
OUT = HERE.parent / "docs" / "results" / "packing.md"
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Side:
    """Micro-batches over all rows, and how many of their tokens are real."""

    batches: list[Batch]
    tokens: int

    @property
    def padding(self) -> float:
        return 1.0 - self.tokens / sum(batch["input_ids"].numel() for batch in self.batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(DATA / "hh-rlhf"))
    parser.add_argument("--tokenizer", default=str(DATA / "stories260K"))
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="llama-15m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="write no page")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tok = AutoTokenizer.from_pretrained(arguments.tokenizer)
    found = sides(arguments, rows(arguments, tok), int(tok.pad_token_id or 0))
    model = policy(arguments, device)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    losses: dict[str, float] = {}
    for turn in range(arguments.turns + 1):
        for name, side in found.items():
            spent, losses[name] = once(model, side.batches, device)
            if turn:
                seconds[name].append(spent)
    difference = abs(losses["packed"] - losses["rows"])
    assert difference < (1e-3 if arguments.dtype == "float32" else 2e-2), f"the losses differ: {losses}"
    text = page(arguments, device, found, seconds, losses)
    print(text)
    if not arguments.print:
        OUT.write_text(text, encoding="utf-8")


def rows(arguments: argparse.Namespace, tok: Any) -> Dataset:
    """The first rows of the data that fit, in a random order."""
    encoder, fitting = encode.Encoder(tok), []
    for row in read.rows(arguments.data):
        if not isinstance(row, read.Row):
            continue
        try:
            fitting.append(
                encode.demonstration(encoder, demonstration(row, "chosen"), arguments.max_length, "completion")
            )
        except Skip:
            continue
        if len(fitting) == 20 * arguments.rows:
            break
    chosen = random.Random(0).sample(fitting, min(arguments.rows, len(fitting)))
    return Dataset.from_list(chosen)


def sides(arguments: argparse.Namespace, rows: Dataset, pad: int) -> dict[str, Side]:
    lengths = [len(ids) for ids in rows["input_ids"]]
    packed = pack_dataset(rows, arguments.max_length, "bfd")
    fewer = max(1, round(arguments.micro_batch * statistics.mean(lengths) / arguments.max_length))
    ways = {
        "rows": (rows, DataCollatorForLanguageModeling(pad), arguments.micro_batch),
        "packed": (packed, Collator(pad), fewer),
    }
    found = {}
    for name, (data, collate, size) in ways.items():
        stream = iter(data)
        found[name] = Side(
            [collate(part) for part in iter(lambda s=stream, n=size: list(islice(s, n)), [])], sum(lengths)
        )
    return found


def policy(arguments: argparse.Namespace, device: torch.device) -> Any:
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        shapes.write(Path(folder), arguments.shape, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return build.attach(model, Adapter(r=8, alpha=16), "CAUSAL_LM").to(device).train()


def once(model: Any, batches: list[Batch], device: torch.device) -> tuple[float, float]:
    """(seconds of a forward and a backward pass over every micro-batch, mean loss of all target tokens)."""
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    began, total = time.perf_counter(), torch.zeros((), device=device)
    for batch in batches:
        given = {name: column.to(device) for name, column in batch.items()}
        loss = model(**given, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        total += loss.detach().float()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - began
    model.zero_grad()
    return spent, float(total)


def page(
    arguments: argparse.Namespace,
    device: torch.device,
    found: dict[str, Side],
    seconds: dict[str, list[float]],
    losses: dict[str, float],
) -> str:
    ratios = sorted(a / b for a, b in zip(seconds["rows"], seconds["packed"], strict=True))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    lines = [
        "# Packing",
        "",
        f"`python scripts/bench_packing.py`, Python {platform.python_version()}, torch {torch.__version__}, {name}. "
        f"Commit {commit()}.",
        "",
        f"{arguments.rows} rows of {Path(arguments.data).name} of at most {arguments.max_length} tokens, "
        f"{found['rows'].tokens / arguments.rows:.0f} on average; {arguments.shape}, {arguments.dtype}, LoRA r=8; forward "
        f"and backward, both in turns, medians of {arguments.turns}. Mean loss {losses['rows']:.5f} and, packed, "
        f"{losses['packed']:.5f}.",
        "",
        "| | micro-batches | padding | real tokens/s |",
        "|---|---|---|---|",
    ]
    for name, side in found.items():
        speed = side.tokens / statistics.median(seconds[name])
        height = len(side.batches[0]["input_ids"])
        lines.append(f"| {name} | {len(side.batches)} of {height} | {side.padding:.1%} | {speed:,.0f} |")
    lines += ["", f"Packed is {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f}).", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
