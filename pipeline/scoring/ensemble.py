"""One score from the scores of several reward models."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def combine(scores: Tensor, how: Literal["mean", "min", "mean_minus_std"], k: float) -> Tensor:
    """Scores [members, batch] -> [batch]: the members' mean, their minimum, or the mean less `k` standard deviations.

    The conservative objectives of Coste et al. 2024 (arXiv 2310.02743): `min` is their worst case, `mean_minus_std` their
    uncertainty-weighted one, except that they take off the variance over members. The standard deviation has the scores'
    own unit, so that `k` means the same at every scale; it is Bessel-corrected, and 0 for one member.
    """
    if how == "min":
        return scores.min(0).values
    mean = scores.mean(0)
    if how == "mean" or len(scores) == 1:  # one value has no corrected deviation: torch answers NaN
        return mean
    return mean - k * torch.std(scores, 0, correction=1)
