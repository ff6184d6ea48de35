"""Rewards to advantages: one pure function per estimator, and what each needs. Torch-free to import, for recipe checks.

Everywhere B is the global rollout batch, the `samples` responses to one prompt next to each other, and T the response
tokens; `rewards` [B, T] are per-token rewards (`token_rewards`), `mask` [B, T] is 1 on response tokens. All float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def token_rewards(kl: Tensor, scores: Tensor, lengths: Tensor, coef: float) -> Tensor:
    """Per-token rewards, float32 [B, T]: -coef * kl on every token, plus the score on the last response token.

    `kl` [B, T] is zero past each response, `scores` [B], `lengths` [B] counts response tokens (EOS included, at least 1).
    """
    rewards = -coef * kl
    return rewards.scatter_add(1, (lengths - 1).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T], zero where `mask` is zero; the value after the last token is zero.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t, before any whitening.
    Schulman et al. 2015, arXiv 1506.02438, equation 16.
    """
    values, rewards = values * mask, rewards * mask
    following = values.roll(-1, dims=1)
    following[:, -1] = 0.0
    deltas = rewards + gamma * following - values
    advantages = _discounted(deltas, mask, gamma * lam)
    return advantages, (advantages + values) * mask


def grpo(rewards: Tensor, mask: Tensor, samples: int, std: bool) -> Tensor:
    """A response's total reward less its group's mean, over the group's standard deviation if `std`; on every token.

    Shao et al. 2024, arXiv 2402.03300, section 4.1.2; without `std`, Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO). The
    deviation is Bessel-corrected, and 1e-4 is added to it, as in TRL.
    """
    groups = _totals(rewards, mask, samples)
    advantages = groups - groups.mean(1, keepdim=True)
    if std:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.reshape(-1, 1) * mask


def rloo(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """A response's total reward less the mean of the other responses to its prompt; on every token.

    Ahmadian et al. 2024, arXiv 2402.14740.
    """
    groups = _totals(rewards, mask, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1, 1) * mask


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The discounted sum of the rewards from each token on; whitened over the whole batch by its declaration below.

    REINFORCE++: Hu 2025, arXiv 2501.03262.
    """
    return _discounted(rewards * mask, mask, gamma)


def remax(rewards: Tensor, mask: Tensor, baseline: Tensor, gamma: float) -> Tensor:
    """The discounted sum of the rewards from each token on, less the score `baseline` [B] of the greedy response.

    ReMax: Li et al. 2023, arXiv 2310.10505. The baseline is a score alone, without a KL penalty.
    """
    return (_discounted(rewards * mask, mask, gamma) - baseline.unsqueeze(1)) * mask


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """`values` with masked mean 0 and Bessel-corrected variance 1 over the whole [B, T]; zero where `mask` is zero."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).pow(2) * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * (variance + eps).rsqrt() * mask


def _discounted(values: Tensor, mask: Tensor, factor: float) -> Tensor:
    """[B, T]: the sum over s >= t of factor^(s - t) values_s, zero where `mask` is zero."""
    sums, running = values.new_zeros(values.shape), values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        running = (values[:, t] + factor * running) * mask[:, t]
        sums[:, t] = running
    return sums


def _totals(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """Summed rewards [prompts, samples]."""
    return (rewards * mask).sum(1).reshape(-1, samples)


@dataclass(frozen=True)
class Given:
    """What an estimator may use: rewards, values (zero without a critic) and mask [B, T]; baseline [B], the scores of the
    prompts' greedy responses (zero unless asked for); and the recipe's numbers."""

    rewards: Tensor
    values: Tensor
    mask: Tensor
    baseline: Tensor
    samples: int
    gamma: float
    lam: float
    group_std: bool


@dataclass(frozen=True)
class Estimator:
    """`compute` gives (advantages, returns); returns are None without a critic. The rest is what the estimator needs or
    does unless the recipe says otherwise: a critic, at least `samples` responses per prompt, a greedy response too, where
    the KL penalty goes, the mean over tokens or over sequences, and whether advantages are whitened over the batch."""

    compute: Callable[[Given], tuple[Tensor, Tensor | None]]
    critic: bool = False
    samples: int = 1
    greedy: bool = False
    kl: Literal["reward", "loss"] = "reward"
    aggregation: Literal["token", "sequence"] = "token"
    whiten: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(lambda g: gae(g.rewards, g.values, g.mask, g.gamma, g.lam), critic=True, whiten=True),
    "grpo": Estimator(
        lambda g: (grpo(g.rewards, g.mask, g.samples, g.group_std), None), samples=2, kl="loss", aggregation="sequence"
    ),
    "rloo": Estimator(lambda g: (rloo(g.rewards, g.mask, g.samples), None), samples=2),
    "reinforce_pp": Estimator(lambda g: (reinforce_pp(g.rewards, g.mask, g.gamma), None), whiten=True),
    "remax": Estimator(lambda g: (remax(g.rewards, g.mask, g.baseline, g.gamma), None), greedy=True),
}
