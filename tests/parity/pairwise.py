"""The reward model's loss as Relay gets it: TRL's, on scores instead of a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def trl_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, center: float | None = None) -> Tensor:
    """RewardTrainer.compute_loss on given scores [B]: a model that answers them, and the trainer's own state in words."""
    from trl import RewardTrainer

    class Scores(nn.Module):
        def forward(self, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.cat([chosen, rejected]).unsqueeze(1))

    model = Scores()
    alone = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=alone,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * len(chosen), 1)}
    if margins is not None:
        inputs["margin"] = margins
    return RewardTrainer.compute_loss(trainer, model, inputs)
