"""The papers' formulas, one response (or one number) at a time, in float64 NumPy and plain loops.

Nothing here knows masks, padding or the project's code: a response is a row of exactly as many numbers as it has tokens, a
batch is a list of such rows, and a group is the responses to one prompt, next to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


def zeros(rows: list[Row]) -> list[Row]:
    return [np.zeros(len(row)) for row in rows]


# KL.


def k1(policy: Row, reference: Row) -> Row:
    """log p(x) - log q(x): Schulman, "Approximating KL divergence" (2020), k1 for KL(p || q) with x from p."""
    return np.array([p - q for p, q in zip(policy, reference, strict=True)])


def k3(policy: Row, reference: Row) -> Row:
    """r - 1 - log r with r = q(x) / p(x): the same note, k3. Also the KL of GRPO, arXiv 2402.03300, equation 4."""
    return np.array([math.exp(q - p) - 1.0 - (q - p) for p, q in zip(policy, reference, strict=True)])


def adapted(coef: float, kl: float, target: float, sequences: int, horizon: int) -> float:
    """beta (1 + K e), e = clip(KL / target - 1, -0.2, 0.2): Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    The paper's K is 0.1; its code has K = sequences / horizon.
    """
    error = kl / target - 1.0
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return coef + coef * (sequences / horizon) * error


# Rewards and advantages.


def token_rewards(kl: Row, score: float, coef: float) -> Row:
    """R(x, y) = r(x, y) - beta KL, spread over tokens: -beta KL_t on each, r on the last. arXiv 1909.08593, equation 2."""
    rewards = np.array([-coef * k for k in kl])
    rewards[-1] += score
    return rewards


def gae(rewards: Row, values: Row, gamma: float, lam: float) -> Row:
    """Schulman et al. 2015, arXiv 1506.02438, equation 16, first line: the weighted average of the k-step advantages

    A(k)_t = r_t + gamma r_{t+1} + ... + gamma^(k-1) r_{t+k-1} + gamma^k V_{t+k} - V_t   (equation 14),

    with weights (1 - lam) lam^(k-1). After the last token rewards and values are zero, so all A(k) that reach past it are
    equal and share the weight that is left, lam^(k-1).
    """
    n, advantages = len(rewards), np.zeros(len(rewards))
    for t in range(n):
        for k in range(1, n - t + 1):
            step = -values[t] + sum(gamma**i * rewards[t + i] for i in range(k))
            if t + k < n:
                advantages[t] += (1.0 - lam) * lam ** (k - 1) * (step + gamma**k * values[t + k])
            else:
                advantages[t] += lam ** (k - 1) * step
    return advantages


def reward_to_go(rewards: Row, gamma: float) -> Row:
    """G_t = sum over s >= t of gamma^(s - t) r_s. REINFORCE++ (arXiv 2501.03262) with the KL in r, before normalisation."""
    return np.array([sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))])


def remax(rewards: Row, baseline: float, gamma: float) -> Row:
    """Reward-to-go less the greedy response's score. Li et al. 2023, arXiv 2310.10505 (there gamma = 1)."""
    return np.array([g - baseline for g in reward_to_go(rewards, gamma)])


def rloo(totals: Row) -> Row:
    """R_i - 1/(k-1) sum over j != i of R_j: Ahmadian et al. 2024, arXiv 2402.14740. One group."""
    k = len(totals)
    return np.array([totals[i] - sum(totals[j] for j in range(k) if j != i) / (k - 1) for i in range(k)])


def grpo(totals: Row, std: bool) -> Row:
    """(r_i - mean) / (std + 1e-4): Shao et al. 2024, arXiv 2402.03300, section 4.1.2, as in TRL 1.16 (grpo_trainer.py):
    sample deviation, k - 1 below. Without std: Dr. GRPO, arXiv 2503.20783. One group."""
    k = len(totals)
    mean = sum(totals) / k
    deviation = math.sqrt(sum((r - mean) ** 2 for r in totals) / (k - 1)) + 1e-4
    return np.array([(r - mean) / (deviation if std else 1.0) for r in totals])


def whiten(rows: list[Row], eps: float = 1e-8) -> list[Row]:
    """(x - mean) / sqrt(variance + eps) over all tokens of all rows, variance with n - 1 below (Bessel); TRL's and verl's
    `masked_whiten`. A batch of one token has no variance: it is only centred."""
    flat = [x for row in rows for x in row]
    n, mean = len(flat), sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (n - 1) if n > 1 else 0.0
    return [np.array([(x - mean) / math.sqrt(variance + eps) for x in row]) for row in rows]


# Losses of one token.


def clip(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def policy_loss(new: float, old: float, advantage: float, eps: float, dual: float | None = None) -> float:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A): Schulman et al. 2017, arXiv 1707.06347, equation 7, as a loss.

    With `dual` (c > 1), where A < 0: -max(min(...), c A). Ye et al. 2020, arXiv 1912.09729, equation 5.
    """
    ratio = math.exp(new - old)
    objective = min(ratio * advantage, clip(ratio, 1.0 - eps, 1.0 + eps) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


def policy_clipped(new: float, old: float, advantage: float, eps: float) -> bool:
    """The clip takes the token's gradient away: rho above 1 + eps where A > 0, below 1 - eps where A < 0."""
    ratio = math.exp(new - old)
    return (advantage > 0 and ratio > 1.0 + eps) or (advantage < 0 and ratio < 1.0 - eps)


def value_loss(new: float, old: float, target: float, eps: float | None) -> float:
    """1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2): the value loss of OpenAI's PPO2, not in the paper."""
    plain = (new - target) ** 2
    return 0.5 * (plain if eps is None else max(plain, (clip(new, old - eps, old + eps) - target) ** 2))


# Means of token losses.


def token_mean(rows: list[Row]) -> float:
    """Every token counts the same: the sum over all tokens over their number (DAPO's token-level loss, arXiv 2503.14476)."""
    return float(sum(x for row in rows for x in row) / sum(len(row) for row in rows))


def sequence_mean(rows: list[Row]) -> float:
    """Every response counts the same: 1/G sum over responses of 1/|o_i| sum over its tokens (GRPO, equation 3)."""
    return float(sum(sum(row) / len(row) for row in rows) / len(rows))


# Reward model.


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + e^-x)), without overflow."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def pairwise_loss(chosen: Row, rejected: Row, margins: Row | None = None, center: float | None = None) -> float:
    """Mean of -log sigmoid(r_c - r_r - m): Bradley-Terry as in Ouyang et al. 2022 (arXiv 2203.02155, equation 1), with the
    margin of Llama 2 (arXiv 2307.09288, equation 2), plus center x mean of (r_c + r_r)^2 (Eisenstein et al. 2023,
    arXiv 2312.09244)."""
    n, total, penalty = len(chosen), 0.0, 0.0
    for i in range(n):
        margin = margins[i] if margins is not None else 0.0
        total -= log_sigmoid(chosen[i] - rejected[i] - margin)
        penalty += (chosen[i] + rejected[i]) ** 2
    return (total + (center or 0.0) * penalty) / n


# What the model says of a token.


def log_prob(logits: Row, token: int, temperature: float) -> float:
    """log of the softmax of logits / temperature at `token`."""
    weights = [math.exp(z / temperature) for z in logits]
    return math.log(weights[token] / sum(weights))


def entropy(logits: Row, temperature: float) -> float:
    """-sum of p log p over the vocabulary, p the softmax of logits / temperature."""
    weights = [math.exp(z / temperature) for z in logits]
    p = [w / sum(weights) for w in weights]
    return -sum(x * math.log(x) for x in p)


# Gradients.


def slope(
    function: Callable[[NDArray[np.float64]], float], point: NDArray[np.float64], step: float = 1e-6
) -> NDArray[np.float64]:
    """Central finite differences of a scalar function of an array."""
    gradient, flat = np.zeros(point.size), point.reshape(-1)
    for i in range(point.size):
        ends = []
        for sign in (1.0, -1.0):
            moved = flat.copy()
            moved[i] += sign * step
            ends.append(function(moved.reshape(point.shape)))
        gradient[i] = (ends[0] - ends[1]) / (2.0 * step)
    return gradient.reshape(point.shape)
