"""Measure the peak memory of ranks beside the plan: {LoRA, QLoRA, full} x ZeRO {0, 2, 3} at two model sizes.

Runs a reward stage and PPO stages on random Llama models, two ranks each, with `scripts/bench_memory/peak.py` around them.
Writes docs/results/memory.md. Peaks that `--work` holds already are not measured again; `--report` measures none and says
which are missing.

    python scripts/bench_memory.py --work FOLDER [--sizes small,large] [--methods lora,qlora,full] [--zero 0,2,3] [--out FILE]

On CPUs the measure is the process's highest resident size, nothing subtracted. glibc keeps most of what is freed for later
and cuts it into pieces, so that the resident size grows beyond what is allocated; MALLOC_MMAP_THRESHOLD_ makes it give every
tensor back when it is freed, as `--allocator default` does not. On GPUs the measure is `torch.cuda.max_memory_reserved`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import launch  # noqa: E402
from pipeline.config.kinds import KINDS  # noqa: E402
from pipeline.config.recipe import load  # noqa: E402
from pipeline.memory import estimate, shape  # noqa: E402

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
PROMPT, RESPONSE = 192, 32
ROWS = 40
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384"}
"""Bytes from which glibc gives an allocation pages of its own, and returns them when it is freed."""


def main() -> None:
    options = parsed()
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data(folder)
    rows = []
    for size, method in itertools.product(options.sizes.split(","), options.methods.split(",")):
        parameters = model(folder / size, size)
        path = recipe(folder, size, method)
        for stage, zero in [("reward", "2"), *(("ppo", zero) for zero in options.zero.split(","))]:
            rows.append(row(f"{size} ({parameters / 1e6:.0f} M)", method, path, folder, stage, zero, options))
    options.out.write_text(page(rows, options), encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, runs and what was measured")
    parser.add_argument("--report", action="store_true", help="write the page from what was measured so far")
    parser.add_argument("--sizes", default="small,large")
    parser.add_argument("--methods", default="lora,qlora,full")
    parser.add_argument("--zero", default="0,2,3")
    parser.add_argument("--allocator", default="returning", choices=["returning", "default"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "memory.md")
    return parser.parse_args()


def row(size: str, method: str, path: Path, folder: Path, stage: str, zero: str, options: argparse.Namespace) -> str:
    """Run a stage, or take what was measured before, and compare; a line of the table."""
    given = [f"stages.{stage}.deepspeed.config=zero{zero}"]
    kind: Literal["cpu", "cuda"] = "cpu" if launch.devices() is None else "cuda"
    need = estimate(load(path, given), stage, None, kind)
    kept = folder / "measured.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    key, began = f"{path.stem} {stage} zero{zero} {options.allocator}", time.monotonic()
    if key not in known and options.report:
        return f"| {size} | {stage} | {method} | {zero} | not measured | {need.bytes / 2**20:,.0f} | | {need.peak} |"
    if key not in known:
        known[key] = measure(path, stage, folder, given, options.allocator)
        kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
    line = (
        f"| {size} | {stage} | {method} | {zero} | {known[key] / 2**20:,.0f} | {need.bytes / 2**20:,.0f} | "
        f"{need.bytes / known[key]:.3f} | {need.peak} |"
    )
    print(f"{line} {time.monotonic() - began:.0f} s", flush=True)
    return line


def measure(path: Path, stage: str, folder: Path, given: list[str], allocator: str) -> int:
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
    env |= MALLOC if allocator == "returning" else {}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in peaks.glob("*.json")]
    if done.returncode or len(found) != loaded.stages[stage].deepspeed.ranks:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return max(int(rank.get("resident", rank.get("reserved", 0))) for rank in found)


def model(folder: Path, size: str) -> int:
    """Write a random Llama with the quickstart's tokenizer; its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (folder / "config.json").exists():
        return shape(json.loads((folder / "config.json").read_text(encoding="utf-8")), size).parameters
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


def page(rows: list[str], options: argparse.Namespace) -> str:
    asked = [f"--{name} {getattr(options, name)}" for name in ("sizes", "methods", "zero", "allocator")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft", "trl"))
    ratios = [float(row.split("|")[7]) for row in rows if row.split("|")[7].strip()]
    device = (
        "GPUs: `torch.cuda.max_memory_reserved`" if launch.devices() else "CPUs: the process's highest resident size"
    )
    malloc = " ".join(f"{key}={value}" for key, value in MALLOC.items()) if options.allocator == "returning" else "none"
    return (
        f"""# The memory plan beside the measured peak

`python scripts/bench_memory.py --work FOLDER {" ".join(asked)}`
(plan of commit {commit.stdout.strip()}; {versions}; {os.uname().sysname}, Python {sys.version.split()[0]})

Random Llama models, two ranks; LoRA (r 16, all linear layers) and full fine-tuning in float32, QLoRA on nf4 under bf16.
Prompts of {PROMPT} tokens, responses of {RESPONSE}; PPO with policy, reference, critic and reward model, two optimizer steps
on micro-batches of two rows.

- *measured*: the higher rank's peak in MiB, on {device}, nothing subtracted. Allocator settings: {malloc}.
- *planned*: what `relay plan` says for the same recipe, libraries included.
- *ratio*: planned by measured, from {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} of {len(rows)} cases.
- *phase*: where the plan sees the peak.

The constant for libraries, ZeRO-2's second bucket and ZeRO-3's prefetching were settled while such cases were measured: the
table says how well the plan describes them, not how well it foretells others. With glibc's own settings ranks on CPUs
take more than this: see [the plan's page](../memory.md).

| model | stage | method | ZeRO | measured | planned | ratio | phase |
|---|---|---|---|---|---|---|---|
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
