"""What `test_sources.py` asks warm ranks to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def encoded_rows(recipe: str, run_dir: str) -> dict[str, Any]:
    """What this rank is given as the rows of the recipe's `sft` stage."""
    from transformers import AutoTokenizer

    from pipeline import stage
    from pipeline.data.encoded import demonstrations

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {}

    def read(context: stage.Context) -> None:
        from pipeline import engine

        engine.start(0)
        data = demonstrations(context, AutoTokenizer.from_pretrained(context.base), 128, "completion")
        for part, rows in (("train", data.train), ("held_out", data.held_out)):
            found[part] = [len(rows), hashlib.sha256(json.dumps(rows[:]).encode()).hexdigest()]
        found["files"] = sorted(file.stat().st_ino for file in data.folder.iterdir())

    stage.execute(read, recipe, "sft", Path(run_dir), [f"deepspeed.num_gpus={world}"], rank, world)
    return found
