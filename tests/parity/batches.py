"""Random batches for hypothesis, and the comparison of a padded tensor with rows of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tests.parity.reference import Row

quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Batch:
    """Responses of `lengths` tokens, `samples` to a prompt, in rows of `width` columns, and the recipe's numbers.

    Random numbers come from `seed`. They are float32 values, so that either precision starts from the same ones.
    """

    lengths: tuple[int, ...]
    width: int
    samples: int = 1
    seed: int = 0
    gamma: float = 1.0
    lam: float = 0.95
    coef: float = 0.05

    def normal(self, name: str, mean: float = 0.0, std: float = 1.0) -> NDArray[np.float64]:
        """[B, width], garbage past the responses included; the same for the same name."""
        drawn = self._generator(name).normal(mean, std, (len(self.lengths), self.width))
        return drawn.astype(np.float32).astype(np.float64)

    def steps(self, name: str) -> NDArray[np.float64]:
        """[B, width] multiples of 1/64, zero as often as not: float32 adds them exactly, and responses can tie."""
        generator = self._generator(name)
        drawn = generator.integers(-64, 65, (len(self.lengths), self.width)) / 64
        return np.where(generator.random(drawn.shape) < 0.5, 0.0, drawn)

    def scores(self, name: str) -> NDArray[np.float64]:
        """[B]."""
        drawn = self._generator(name).normal(0.0, 2.0, len(self.lengths))
        return drawn.astype(np.float32).astype(np.float64)

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])

    def rows(self, padded: NDArray[np.float64]) -> list[Row]:
        """What lies on response tokens."""
        return [padded[i, :n] for i, n in enumerate(self.lengths)]

    def padded(self, rows: list[Row]) -> NDArray[np.float64]:
        """[B, width], zero past the responses."""
        out = np.zeros((len(self.lengths), self.width))
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def groups(self, totals: NDArray[np.float64]) -> list[Row]:
        return [totals[i : i + self.samples] for i in range(0, len(totals), self.samples)]

    def mask(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([[1.0] * n + [0.0] * (self.width - n) for n in self.lengths], dtype=dtype)

    def tokens(self) -> Tensor:
        """Lengths, int64 [B]."""
        return torch.tensor(self.lengths)


@st.composite
def batches(draw: st.DrawFn, samples: st.SearchStrategy[int] | None = None) -> Batch:
    """One to four prompts, responses of one to nine tokens, up to two columns that no response reaches."""
    count = draw(samples) if samples is not None else 1
    rows = count * draw(st.integers(1, 4))
    lengths = tuple(draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows)))
    return Batch(
        lengths,
        max(lengths) + draw(st.integers(0, 2)),
        count,
        draw(st.integers(0, 2**16)),
        gamma=draw(st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.0]) | st.floats(0.0, 1.0)),
        lam=draw(st.sampled_from([1.0, 0.95, 0.0]) | st.floats(0.0, 1.0)),
        coef=draw(st.floats(0.0, 1.0)),
    )


groups = batches(st.integers(2, 4))
one_token = Batch((1,), 1)
"""A batch of one row of one token."""


def tensor(values: NDArray[np.float64], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def agree(found: Tensor, expected: NDArray[np.float64]) -> None:
    """Equal as far as the found tensor's precision goes: 1e-5 in float32, 1e-12 in float64, of each and of the largest."""
    tolerance = TOLERANCE[found.dtype]
    largest = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance * largest)
