"""Recipes of preference stages on a few of the quickstart's pairs, and what plain libraries say of their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.support import tiny

STAGE: dict[str, Any] = {
    "init": "sft",
    "steps": 2,
    "batch": 8,
    "micro_batch": 2,
    "lr": 1e-2,
    "log_every": 1,
    "eval_rows": 8,
}


def files(folder: Path, rows: int = 72) -> dict[str, str]:
    """Pairs, and the same replies labelled one by one, alternately the better and the worse."""
    lines = (tiny.QUICKSTART / "preferences.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    pairs = [json.loads(line) for line in lines]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair["rejected" if number % 2 else "chosen"], "label": not number % 2}
        for number, pair in enumerate(pairs)
    ]
    found = {}
    for kind, content in (("dpo", pairs), ("kto", labelled)):
        path = folder / f"{kind}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in content))
        found[kind] = str(path)
    return found


def recipe(folder: Path, base: Path, stages: dict[str, dict[str, Any]], **changes: Any) -> Path:
    """A short sft stage, and `stages`, each with its `kind` and what differs from STAGE."""
    path = tiny.recipe(folder / "r.yaml", base, **{"data__holdout": 0.25, "stages__sft__steps": 2, **changes})
    value, data = yaml.safe_load(path.read_text()), files(folder)
    value["stages"] = {"sft": value["stages"]["sft"]} | {
        name: {**STAGE, "data": [{"path": data[more["kind"]]}], **more} for name, more in stages.items()
    }
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def rows(run: Path, stage: str, part: str) -> list[dict[str, Any]]:
    """A stage's encoded rows, as they lie on disk."""
    from datasets import Dataset

    (file,) = (run / ".rows" / f"{stage}.data").glob(f"*/{part}.arrow")
    return Dataset.from_file(str(file)).to_list()


def policy(folder: Path) -> Any:
    """A published policy in plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import pipeline.adapters  # noqa: F401  (registers Relay's own methods with PEFT)

    config = folder / "adapter_config.json"
    if not config.is_file():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(json.loads(config.read_text())["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, str(folder)).eval()


def log_prob(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Any:
    """log pi(reply | prompt), summed over its tokens: a scalar tensor, one sequence at a time and without padding."""
    import torch

    ids = torch.tensor([[*prompt, *reply]])
    said = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    return said.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def log_probs(model: Any, asked: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.array([float(log_prob(model, prompt, reply)) for prompt, reply in asked])
