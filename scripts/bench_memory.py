"""Measure the peak memory of ranks beside the plan: {LoRA, QLoRA, full} x ZeRO {0, 2, 3} at two model sizes.

Runs a reward stage and PPO stages on random Llama models, two ranks each, with `scripts/bench_memory/peak.py` around them.
Writes docs/results/memory.md.

    python scripts/bench_memory.py [--sizes small,large] [--methods lora,qlora,full] [--zero 0,2,3] [--out FILE]

On CPUs the measure is the process's highest resident size, nothing subtracted. glibc keeps most of what is freed for later
and cuts it into pieces, so that the resident size grows beyond what is allocated; MALLOC_MMAP_THRESHOLD_ makes it give every
tensor back when it is freed, as `--allocator default` does not. On GPUs the measure is `torch.cuda.max_memory_reserved`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import launch  # noqa: E402
from pipeline.config.kinds import KINDS  # noqa: E402
from pipeline.config.recipe import load  # noqa: E402
from pipeline.memory import estimate  # noqa: E402

PEAK = ROOT / "scripts" / "bench_memory" / "peak.py"
QUICKSTART = ROOT / "pipeline" / "recipes" / "quickstart"
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 8192},
    "large": {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 14, "vocab_size": 16384},
}
METHODS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "lora": ({"dtype": "fp32"}, {"method": "lora", "r": 16}),
    "qlora": ({"dtype": "bf16", "quantization": "nf4"}, {"method": "lora", "r": 16}),
    "full": ({"dtype": "fp32"}, {"method": "full"}),
}
PROMPT, RESPONSE = 256, 64
ROWS = 40
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Bytes from which glibc gives an allocation pages of its own, and returns them when it is freed."""


def main() -> None:
    options = parsed()
    rows: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data(folder)
        for size in options.sizes.split(","):
            parameters = model(folder / size, size)
            for method in options.methods.split(","):
                path = recipe(folder, size, method)
                rows.append(row(size, parameters, method, path, folder, "reward", "2", options.allocator))
                for zero in options.zero.split(","):
                    rows.append(row(size, parameters, method, path, folder, "ppo", zero, options.allocator))
    options.out.write_text(page(rows, options, time.monotonic() - began), encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,large")
    parser.add_argument("--methods", default="lora,qlora,full")
    parser.add_argument("--zero", default="0,2,3")
    parser.add_argument("--allocator", default="returning", choices=["returning", "default"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "memory.md")
    return parser.parse_args()


def row(size: str, parameters: int, method: str, path: Path, folder: Path, stage: str, zero: str, malloc: str) -> str:
    """Run a stage and compare; a line of the table."""
    given = [f"stages.{stage}.deepspeed.config=zero{zero}"]
    kind = "cpu" if launch.devices() is None else "cuda"
    need = estimate(load(path, given), stage, None, kind)  # type: ignore[arg-type]
    began = time.monotonic()
    measured = measure(path, stage, folder, given, malloc)
    line = (
        f"| {size} ({parameters / 1e6:.0f} M) | {stage} | {method} | {zero} | {measured / 2**20:,.0f} | "
        f"{need.bytes / 2**20:,.0f} | {need.bytes / measured:.3f} | {need.peak} |"
    )
    print(f"{line} {time.monotonic() - began:.0f} s", flush=True)
    return line


def measure(path: Path, stage: str, folder: Path, given: list[str], malloc: str) -> int:
    """The highest peak of the stage's ranks, in bytes."""
    peaks = folder / "peaks"
    peaks.mkdir(exist_ok=True)
    for old in peaks.glob("*.json"):
        old.unlink()
    loaded, run_dir = load(path, given), folder / "runs" / path.stem
    command = launch.command(loaded, stage, run_dir, given, launch.free_port())
    at = command.index("--module")
    command[at : at + 2] = [str(PEAK), KINDS[loaded.stages[stage].kind].module]
    command.remove("--lock-held")
    env = launch.environment() | {"RELAY_PEAKS": str(peaks), "PYTHONPATH": str(ROOT)}
    env |= MALLOC if malloc == "returning" else {}
    env.pop(launch.PARENT)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in peaks.glob("*.json")]
    if done.returncode or len(found) != loaded.stages[stage].deepspeed.ranks:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return max(int(rank.get("resident", rank.get("reserved", 0))) for rank in found)


def model(folder: Path, size: str) -> int:
    """Write a random Llama with the quickstart's tokenizer; its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    heads = SIZES[size]["hidden_size"] // 64
    config = AutoConfig.for_model(
        "llama",
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        **SIZES[size],
    )
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(built.num_parameters())


def data(folder: Path) -> None:
    """Prompts and pairs made of the quickstart's, as long as the recipe allows: the plan counts full lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    lines = (QUICKSTART / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [json.loads(line)["prompt"].strip() for line in lines]

    def text(tokens: int, start: int) -> str:
        found = ""
        while len(tokenizer(longer := f"{found}{sentences[start % len(sentences)]} ")["input_ids"]) < tokens:
            found, start = longer, start + 1
        return found

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    prompts = [text(PROMPT, 7 * number) for number in range(ROWS)]
    write("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    pairs = [(text(RESPONSE, 7 * number + 3), text(RESPONSE, 7 * number + 9)) for number in range(ROWS)]
    write(
        "pairs.jsonl",
        [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in zip(prompts, pairs, strict=True)],
    )


def recipe(folder: Path, size: str, method: str) -> Path:
    """Two steps of a reward stage and two optimizer steps of PPO from the base, so that the moments are there at the peak."""
    base, adapter = METHODS[method]
    batch = 8 if size == "small" else 4  # with and without accumulation
    value = {
        "name": f"{size}-{method}",
        "base": {"model": str(folder / size), **base},
        "adapter": adapter,
        "deepspeed": {"config": "zero2", "num_gpus": 2},
        "data": {"holdout": 0.2},
        "stages": {
            "reward": {
                "kind": "reward",
                "data": [{"path": str(folder / "pairs.jsonl")}],
                "steps": 2,
                "batch": batch // 2,
                "micro_batch": 1,
                "max_length": PROMPT + RESPONSE,
                "lr": 1e-5,
                "eval_rows": 2,
            },
            "ppo": {
                "kind": "ppo",
                "policy": "base",
                "reward": "reward",
                "prompts": [{"path": str(folder / "prompts.jsonl")}],
                "steps": 1,
                "rollout_batch": batch,
                "epochs": 2,
                "micro_batch": 2,
                "lr": 1e-6,
                "eval_rows": 2,
                "sampling": {
                    "max_prompt_length": PROMPT,
                    "max_response_length": RESPONSE,
                    "batch": 4,
                    "adapter": "unmerged",
                },
            },
        },
    }
    path = folder / f"{size}-{method}.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


def page(rows: list[str], options: argparse.Namespace, seconds: float) -> str:
    asked = [f"--{name} {getattr(options, name)}" for name in ("sizes", "methods", "zero", "allocator")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft", "trl"))
    ratios = [float(row.split("|")[7]) for row in rows]
    device = (
        "GPUs: `torch.cuda.max_memory_reserved`" if launch.devices() else "CPUs: the process's highest resident size"
    )
    malloc = " ".join(f"{key}={value}" for key, value in MALLOC.items()) if options.allocator == "returning" else "none"
    return (
        f"""# The memory plan beside the measured peak

`python scripts/bench_memory.py {" ".join(asked)}`, commit {commit.stdout.strip()}, {versions}, {os.uname().sysname}
{os.uname().machine}, Python {sys.version.split()[0]}; {seconds / 60:.0f} minutes.

Random Llama models, two ranks; LoRA (r 16, all linear layers) and full fine-tuning in float32, QLoRA on nf4 under bf16.
Prompts of {PROMPT} tokens, responses of {RESPONSE}; PPO with policy, reference, critic and reward model, two optimizer steps
on micro-batches of two rows. *Measured* is the higher rank's peak in MiB, on {device}, nothing subtracted
(allocator settings: {malloc}); *planned* is what `relay plan` says for the same recipe, libraries included; *ratio* is planned
by measured, here from {min(ratios):.3f} to {max(ratios):.3f}; *phase* is where the plan sees the peak.

| model | stage | method | ZeRO | measured | planned | ratio | phase |
|---|---|---|---|---|---|---|---|
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
