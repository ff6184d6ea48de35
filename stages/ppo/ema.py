"""An exponential moving average of the policy in float32, from its float32 master weights.

In 16 bits the average stalls: a step of (1 - decay) of a small change is below the weights' resolution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.engine import masters

FILE = "ema.safetensors"


class Ema:
    """average <- decay * average + (1 - decay) * weights after every step; held on the CPU of rank 0."""

    def __init__(self, engine: Any, named: dict[str, nn.Parameter], decay: float) -> None:
        self.engine, self.named, self.decay = engine, named, decay
        self.average: dict[str, Tensor] = {}
        self.average = self._weights()

    def update(self) -> None:
        """Collective: masters are gathered one by one."""
        for name, weights in self._weights().items():
            self.average[name].lerp_(weights, 1.0 - self.decay)

    def _weights(self) -> dict[str, Tensor]:
        """Whole float32 weights by name on rank 0, an empty dict elsewhere."""
        main = dist.get_rank() == 0
        return {n: w.to("cpu", copy=True) for n, w in masters(self.engine, self.named) if main}

    def save(self, folder: Path) -> None:
        save_file(self.average, folder / FILE)

    def load(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            self.average = load_file(folder / FILE)
