"""Reward model: a scalar score per text, trained so that the better reply of a pair scores higher (Bradley-Terry).

Reads the base model (or an earlier stage named by `init`) and chosen/rejected pairs, with an optional margin column; hands
on a sequence classifier with one label, the score head kept with the adapter. The score is read at the reply's EOS, in
training as in PPO. It does not train an ensemble.

    deepspeed --num_gpus 2 --module stages.reward --recipe quickstart --stage reward --run-dir runs/quickstart
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from pipeline import engine, trainer
from pipeline.config.schema import Reward
from pipeline.data.encoded import preferences
from pipeline.model import begin
from pipeline.stage import Context, main


def reward(context: Context) -> None:
    """Pairwise reward model."""
    block, parent = cast(Reward, context.block), context.parent("init")
    engine.start(block.seed, context.recipe.header.deterministic)

    tok = begin.tokenizer(context, parent)
    data = preferences(context, tok, block.max_length)

    steps, kept = trainer.whole_batches(context, block, len(data.train), len(data.held_out))
    arguments = RewardConfig(
        max_length=None,
        disable_dropout=False,  # the base's is off; what is left is the adapter's own
        center_rewards_coefficient=block.center,
        **trainer.arguments(context, block, steps),
    )
    start = trainer.ready(context, arguments, parent, tok, "classifier", data.longest)

    with context.tracker(steps, start.step) as tracker:
        training = RewardTrainer(
            model=start.model,
            args=arguments,
            train_dataset=data.train.select(range(kept)),
            eval_dataset=data.held_out.select(range(min(len(data.held_out), block.eval_rows)))
            if data.held_out
            else None,
            processing_class=tok,
            **trainer.hooks(context, block, start, tracker),
        )
        trainer.train(context, training, start)
        metrics = held_out_metrics(
            training.model,
            data.held_out,
            tok.pad_token_id,
            arguments.per_device_eval_batch_size,
            data.held_out_by_source(len(data.held_out)),
        )
        tracker.log(steps, metrics)

    write = begin.writer(training.model, tok, start.base)
    trainer.publish(context, start, write, metrics, data.counts)


@torch.no_grad()
def held_out_metrics(
    model: Any, rows: Dataset, pad: int, batch: int, by_source: dict[str, list[int]]
) -> dict[str, float]:
    """Pairwise accuracy on held-out pairs, beside that of always preferring the longer reply (a tie counts one half); also
    of the pairs of each source, whose places `by_source` holds.

    Every rank scores its part; parts are padded to one length because under ZeRO-3 ranks must run in step.
    """
    if not len(rows):
        return {}
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-len(rows) // world)
    mine = [min(i, len(rows) - 1) for i in range(rank * share, (rank + 1) * share)]
    model.eval()
    scores: list[tuple[int, float, float]] = []
    for start in range(0, share, batch):
        picked = mine[start : start + batch]
        texts = [rows[i][side] for side in ("chosen_ids", "rejected_ids") for i in picked]
        width = max(map(len, texts))
        ids = torch.tensor([t + [pad] * (width - len(t)) for t in texts], device=model.device)
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1).tolist()
        scores += list(zip(picked, logits[: len(picked)], logits[len(picked) :], strict=True))
    gathered: list[list[tuple[int, float, float]]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, scores)
    by_row = {i: (chosen, rejected) for part in gathered for i, chosen, rejected in part}

    def preferred(a: float, b: float) -> float:
        return 1.0 if a > b else 0.5 if a == b else 0.0

    accuracy = sum(preferred(*by_row[i]) for i in by_row) / len(rows)
    longer = sum(preferred(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows) / len(rows)
    sources: dict[str, float] = {}
    for name, places in by_source.items():
        right = sum(preferred(*by_row[place]) for place in places)
        sources |= {f"held_out/{name}/accuracy": right / len(places), f"held_out/{name}/pairs": float(len(places))}
    flat = [s for pair in by_row.values() for s in pair]
    return {
        "held_out/accuracy": accuracy,
        "held_out/longer_reply_accuracy": longer,
        "held_out/pairs": float(len(rows)),
        "held_out/mean_score": sum(flat) / len(flat),
        **sources,
    }


if __name__ == "__main__":
    main(reward)
