"""Test what the run made: a policy's replies beside another's, how good reward models are, and what policies forgot.

Reads the stages that the block names; hands on `results.json` and what its parts show. Prompts and pairs are those that no
stage trains on. Models are not sharded: each rank holds them and reads its part of the rows. What was measured is kept in the
run's folder by the models' contents, so that nothing is measured twice.

    deepspeed --num_gpus 2 --module stages.evaluate --recipe quickstart --stage evaluate --run-dir runs/quickstart
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from pipeline import engine
from pipeline.config.evaluate import Evaluate
from pipeline.model import begin
from pipeline.stage import Context, main
from stages.evaluate import forgetting, policy, reward_model
from stages.evaluate.results import Results

TRACKED = 32
"""Replies side by side that W&B and TensorBoard are given."""


def evaluate(context: Context) -> None:
    """Test what the run made."""
    block = cast(Evaluate, context.block)
    device = engine.start(block.seed, context.recipe.header.deterministic)

    found = []
    if block.prompts:
        found.append(policy.compare(context, block, device))
    if block.reward_model:
        found.append(reward_model.test(context, block, block.reward_model, device))
    if block.forgetting:
        found.append(forgetting.compare(context, block, block.forgetting, device))
    results = Results.joined(found)

    def write(folder: Path) -> None:
        (folder / "results.json").write_text(
            json.dumps(results.metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        for name, rows in results.tables.items():
            lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
            (folder / name).write_text("".join(lines), encoding="utf-8")

    with context.tracker(1, 0) as tracker:
        tracker.log(1, results.metrics)
        tracker.samples(1, results.tables.get(policy.SAMPLES, [])[:TRACKED])
    base = begin.base_record(block.base.model_copy(update={"model": context.base}))
    others = {key: counts for key, counts in results.counts.items() if key}
    context.publish(
        write,
        base=base,
        method="none",
        metrics=results.metrics,
        counts=results.counts.get("", {}),
        zero_stage=0,
        others=others,
    )


if __name__ == "__main__":
    main(evaluate)
