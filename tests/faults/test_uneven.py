"""Ranks with unequal work under ZeRO-3, whose every forward pass is a collective: none waits for one that has nothing to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.support import tiny
from tests.support.session import Ranks


def test_uneven_replies_and_one_held_out_row(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    """PPO whose replies end at very different lengths, one held-out row for two ranks in every stage, then an evaluation of one
    prompt: rank 1 has none of its own. A wait that does not end would run into the session's limit."""
    one = {"stages__sft__eval_every": 2, "stages__reward__eval_every": 2, "stages__ppo__eval_every": 2}
    one |= {f"stages__{stage}__{key}": 1 for stage in ("sft", "reward", "ppo") for key in ("eval_rows", "micro_batch")}
    recipe = tiny.recipe(
        tmp_path / "tiny.yaml",
        tiny_llama,
        deepspeed__config="zero3",
        stages__ppo__samples_per_prompt=1,
        stages__ppo__sampling={"max_prompt_length": 32, "max_response_length": 48, "temperature": 1.5},
        stages__compare={
            "kind": "evaluate",
            "model": "ppo",
            "against": "sft",
            "reward": ["reward"],
            "prompts": [{"path": str(tiny.QUICKSTART / "prompts.jsonl"), "limit": 400}],
            "rows": 1,
            "sampling": {"max_prompt_length": 32, "max_response_length": 8},
            "deepspeed": {"config": "zero0", "num_gpus": 2},
        },
        **one,
    )
    run = tmp_path / "run"
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(run))
    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    cut = [(row["val/truncated_responses"], row["objective/length"]) for row in rows if "objective/length" in row]
    ended = [(length - 48 * share) / (1 - share) for share, length in cut if 0 < share < 1]
    assert min(ended) < 24, "some replies end by themselves, long before others are cut at 48 tokens"
    assert [row["step"] for row in rows if "eval/score" in row] == [2, 4]
    assert json.loads((run / "compare" / "output" / "manifest.json").read_text())["metrics"]
