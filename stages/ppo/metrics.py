"""What a rollout batch is worth telling: means under the names TRL's dashboards know, and rows to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.data.encode import Encoder
from stages.ppo.experience import Experience


def describe(batch: Experience, coef: float, *, critic: bool, origins: Sequence[str] = ()) -> dict[str, float]:
    """Means over the sequences of all ranks. `origins` names the source of data that each one's prompt is of: where they are
    several, each one's mean score is `objective/scores_on/<source>`."""
    kl = (batch.kl * batch.mask).sum(1)
    penalty = -coef * kl
    sources = batch.parts if len(batch.parts) > 1 else {}
    return {
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": coef,
        "objective/entropy": float(-(batch.logprobs * batch.mask).sum(1).mean()),
        "objective/scores": float(batch.scores.mean()),
        **{f"objective/scores/{name}": float(part.mean()) for name, part in sources.items()},
        **_scores_on(batch, origins),
        "objective/non_score_reward": float(penalty.mean()),
        "objective/rlhf_reward": float((batch.scores + penalty).mean()),
        "objective/length": float(batch.lengths.float().mean()),
        "val/num_eos_tokens": float(batch.ended.sum()),
        "val/truncated_responses": float((~batch.ended).float().mean()),
        "val/identical_responses": _identical(batch),
        **({"val/explained_variance": _explained(batch)} if critic else {}),
    }


def _scores_on(batch: Experience, origins: Sequence[str]) -> dict[str, float]:
    """The mean score of each source's sequences; nothing for a single source."""
    names = sorted(set(origins))
    chosen = {name: torch.tensor([origin == name for origin in origins], device=batch.scores.device) for name in names}
    means = {f"objective/scores_on/{name}": float(batch.scores[rows].mean()) for name, rows in chosen.items()}
    return means if len(means) > 1 else {}


def _identical(batch: Experience) -> float:
    """Share of the responses that another row of the batch got too."""
    responses = []
    for row in range(len(batch.lengths)):
        start = int(batch.prompt_lengths[row])
        responses.append(tuple(batch.tokens[row, start : start + int(batch.lengths[row])].tolist()))
    return sum(responses.count(response) > 1 for response in responses) / len(responses)


def _explained(batch: Experience) -> float:
    """1 - Var(return - value) / Var(return) over response tokens."""
    kept = batch.mask.bool()
    returns, error = batch.returns[kept], (batch.returns - batch.values)[kept]
    spread = float(returns.var(unbiased=False))
    return 1.0 - float(error.var(unbiased=False)) / spread if spread > 0 else 0.0


def table(batch: Experience, encoder: Encoder, rows: int = 4) -> list[dict[str, Any]]:
    """Prompt, reply, score and KL of the first rows."""
    found = []
    for row in range(min(rows, len(batch.scores))):
        start, end = int(batch.prompt_lengths[row]), int(batch.prompt_lengths[row] + batch.lengths[row])
        found.append(
            {
                "prompt": encoder.text(batch.tokens[row, :start].tolist()),
                "reply": encoder.text(batch.tokens[row, start:end].tolist()),
                "score": float(batch.scores[row]),
                "kl": float(batch.kl[row].sum()),
            }
        )
    return found
