"""The recipe's reward sources over a rollout: reward models, ensembles, functions, endpoints and checks, weighted and added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import RewardSource, StageReward, reward_stages
from pipeline.data.encode import Encoder
from pipeline.errors import Trouble
from pipeline.generation.rollout import Rollout
from pipeline.scoring.ensemble import combine
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.source import Source, build, checked


class Skipped(Exception):
    """A source could not be reached and the recipe says to leave the batch out. Raised on every rank."""


@dataclass(frozen=True)
class Rewards:
    """`sources` as the recipe lists them and their `names`, each unique; `texts` are those that read text, in the same order
    (None for reward stages); `roles` names the role of each reward stage."""

    sources: list[RewardSource]
    names: list[str]
    texts: list[Source | None]
    roles: dict[str, str]
    encoder: Encoder

    @classmethod
    def of(cls, sources: list[RewardSource], roles: dict[str, str], encoder: Encoder, where: str) -> Rewards:
        texts = [None if isinstance(source, StageReward) else build(source, where) for source in sources]
        names: list[str] = []
        for source, text in zip(sources, texts, strict=True):
            name = "+".join(source.stage) if isinstance(source, StageReward) else text.name if text else ""
            used = sum(n == name or n.startswith(f"{name}#") for n in names)
            names.append(f"{name}#{used + 1}" if used else name)
        return cls(sources, names, texts, roles, encoder)

    @property
    def models(self) -> list[str]:
        """The roles of the reward models among the sources."""
        return [self.roles[stage] for stage in reward_stages(*self.sources)]

    def __call__(
        self, said: dict[str, Tensor], rollout: Rollout, rows: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum, each source's own scores by name), float32 [B], of this rank's rollout.

        `said` holds the scores [B] of every role in `models`; `rows` are the data rows of the prompts. Collective. Raises
        Trouble, or Skipped, on every rank when a source fails on any.
        """
        texts, first = self._texts(rollout), dist.get_rank() * len(rollout.lengths)
        parts: dict[str, Tensor] = {}
        problems: list[tuple[bool, str]] = []
        total = torch.zeros(len(rollout.lengths), device=rollout.lengths.device)
        for source, name, text in zip(self.sources, self.names, self.texts, strict=True):
            if isinstance(source, StageReward):
                members = torch.stack([said[self.roles[stage]] for stage in source.stage])
                scores = combine(members, source.combine, source.k)
            else:
                assert text is not None
                try:
                    given = checked(text, *texts, rows)
                except SourceError as error:
                    skip = isinstance(error, SourceUnavailable) and getattr(source, "on_failure", "stop") == "skip"
                    problems.append((skip, str(error.moved(first))))
                    given = [0.0] * len(total)
                scores = torch.tensor(given, dtype=torch.float32, device=total.device)
            if not bool(torch.isfinite(scores).all()):
                row = int((~torch.isfinite(scores)).nonzero()[0])
                found = SourceError(name, row, f"its score is {float(scores[row])}, not finite").moved(first)
                problems.append((False, str(found)))
            parts[name] = scores
            total = total + source.weight * scores
        _agree(problems)
        return total, parts

    def _texts(self, rollout: Rollout) -> tuple[list[str], list[str]]:
        """Prompts and responses as text; nothing where no source reads text."""
        if not any(self.texts):
            return [], []
        rows = range(len(rollout.lengths))
        prompts = [self.encoder.text(rollout.tokens[r, : int(rollout.prompt_lengths[r])].tolist()) for r in rows]
        return prompts, [self.encoder.text(rollout.response(r)) for r in rows]


def _agree(problems: list[tuple[bool, str]]) -> None:
    """Raise on every rank what any rank met, as (may be skipped, message); a failure that stops goes before one that skips."""
    met = [problems]
    if dist.get_world_size() > 1:
        met = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(met, problems)
    found = sorted((problem for part in met for problem in part), key=lambda problem: problem[0])
    if found:
        skip, message = found[0]
        raise Skipped(message) if skip else Trouble(message)
