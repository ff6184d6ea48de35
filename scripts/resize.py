"""Resume under every size: a training stopped after each step and gone on with by other ranks under another configuration.

For each case the worst absolute difference between what the engine held as it saved (float32 weights, both moments, what the
model computes with, steps, learning rates; gathered by DeepSpeed's own functions) and right after the load. Writes the table
of docs/results/resize.md; takes minutes on two cores.

    python scripts/resize.py [--only sft] > table.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support import preferences, tiny
from tests.support.session import Ranks

SIZES = [
    (2, "zero2"),
    (1, "zero3"),
    (2, "zero1"),
    (1, "zero0"),
    (2, "zero3"),
    (1, "zero2_offload"),
    (2, "zero3_offload"),
    (1, "zero1"),
    (2, "zero0"),
    (2, "zero2"),
]
CASES = [
    ("sft", "lora", "fp32"),
    ("sft", "lora", "bf16"),
    ("sft", "lora", "fp16"),
    ("sft", "full", "bf16"),
    ("reward", "lora", "bf16"),
    ("dpo", "lora", "bf16"),
    ("ppo", "lora", "fp32"),
    ("ppo", "lora", "bf16"),
    ("ppo", "adalora", "fp32"),
    ("ppo", "full", "bf16"),
]


def recipe(folder: Path, stage: str, method: str, dtype: str, steps: int) -> Path:
    adapter: dict[str, Any] = {"lora": {"method": "lora", "r": 3, "alpha": 8}, "full": {"method": "full"}}.get(
        method, {"method": "adalora", "init_r": 4, "target_r": 2, "alpha": 8, "tinit": 2, "tfinal": 2}
    )
    base = tiny.model(folder / "base", "llama_small")
    changes: dict[str, Any] = {f"stages__{name}__steps": steps for name in ("sft", "ppo", "reward")}
    changes |= {f"stages__{name}__save_every": steps for name in ("sft", "ppo", "reward")}
    changes |= {"stages__ppo__lr": 1e-3, "base__dtype": dtype, "adapter": adapter, "stages__ppo__policy": "base"}
    changes |= {"stages__ppo__reward": [{"function": "tests.distributed.option_cases:sevens"}]}
    changes |= {"stages__ppo__critic": {"init": "policy"}}
    if stage == "dpo":
        more = {"kind": "dpo", "init": "base", "steps": steps, "save_every": steps}
        return preferences.recipe(folder, base, {"dpo": more}, **{"adapter": adapter, "base__dtype": dtype})
    return tiny.recipe(folder / "r.yaml", base, **changes)


def differences(ranks: dict[int, Ranks], folder: Path, stage: str, method: str, dtype: str) -> list[str]:
    """The worst difference at each change of size."""
    sizes = [size for size in SIZES if dtype != "fp16" or size[1] != "zero0"]
    path, found, before = recipe(folder, stage, method, dtype, len(sizes)), [], None
    for number, (world, config) in enumerate(sizes):
        kept = folder / str(number)
        stop = 1 if number < len(sizes) - 1 else None
        ranks[world].call(
            "tests.support.resizing:run",
            recipe=str(path),
            stage=stage,
            run_dir=str(folder / "run"),
            config=config,
            stop=stop,
            folder=str(kept),
        )
        if before is not None:
            saved, loaded = np.load(before / "saved.npz"), np.load(kept / "loaded.npz")
            assert set(saved) == set(loaded)
            found.append(f"{max(float(np.abs(saved[n] - loaded[n]).max()) for n in saved):.1g}")
        before = kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", help="cases of this stage, such as ppo, or of this stage, method and dtype: ppo-lora-bf16"
    )
    only = parser.parse_args().only or ""
    names = [f"{world} {config}" for world, config in SIZES]
    with tempfile.TemporaryDirectory() as scratch:
        ranks = {world: Ranks(world, Path(scratch, f"ranks{world}")) for world in (1, 2)}
        try:
            print(f"| stage | method | dtype | {' | '.join('→ ' + name for name in names[1:])} |")
            print("|---" * (3 + len(names) - 1) + "|")
            for case in CASES:
                if not "-".join(case).startswith(only):
                    continue
                folder = Path(scratch, "-".join(case))
                folder.mkdir()
                cells = differences(ranks, folder, *case)
                if case[2] == "fp16":
                    cells = [cells.pop(0) if not name.endswith("zero0") else "refused" for name in names[1:]]
                print(f"| {' | '.join([*case, *cells])} |", flush=True)
        finally:
            for session in ranks.values():
                session.close()


if __name__ == "__main__":
    main()
