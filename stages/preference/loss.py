"""Losses of preference pairs that need no reference policy, which TRL's stable trainers lack. Pure functions.

In all of them `chosen` and `rejected` [B] are sums of the log-probabilities of a reply's tokens, EOS included, in nats, and
`chosen_tokens` and `rejected_tokens` [B] count those tokens. All float32; a loss for each pair, float32 [B], comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Pairs:
    """Policy log-probabilities of B pairs and their numbers of tokens, as above."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability of a token of each reply, [B] and [B]."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Judged:
    """`losses` [B], with gradients, and the implicit rewards of both replies [B], without."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


def simpo(pairs: Pairs, beta: float, gamma: float) -> Judged:
    """-log sigmoid(beta/|y_w| log pi(y_w) - beta/|y_l| log pi(y_l) - gamma): Meng et al. 2024, arXiv 2405.14734, equation 6."""
    chosen, rejected = (beta * mean for mean in pairs.per_token())
    return Judged(-logsigmoid(chosen - rejected - gamma), chosen.detach(), rejected.detach())


def cpo(pairs: Pairs, beta: float, alpha: float) -> Judged:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))) + alpha NLL(y_w): Xu et al. 2024, arXiv 2401.08417.

    The second term is the mean over the chosen reply's tokens, as in its authors' code; the paper writes their sum.
    """
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    losses = -logsigmoid(chosen - rejected) - alpha * pairs.per_token()[0]
    return Judged(losses, chosen.detach(), rejected.detach())


def orpo(pairs: Pairs, beta: float) -> Judged:
    """NLL(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)), odds(y) = P(y) / (1 - P(y)) of the geometric mean P over the
    reply's tokens: Hong et al. 2024, arXiv 2403.07691, equations 6 and 7, where beta is lambda."""
    chosen, rejected = pairs.per_token()
    losses = -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return Judged(losses, (beta * chosen).detach(), (beta * rejected).detach())


def _log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P < 0; a P that rounds to 1 counts as the largest below it."""
    below = logp.clamp(max=-torch.finfo(torch.float32).eps)
    return logp - torch.log(-torch.expm1(below))


def reference_free(name: str, pairs: Pairs, numbers: Any) -> Judged:
    """The loss `name` with the `beta`, `simpo_gamma` and `cpo_alpha` of a recipe's block."""
    if name == "simpo":
        return simpo(pairs, numbers.beta, numbers.simpo_gamma)
    if name == "cpo":
        return cpo(pairs, numbers.beta, numbers.cpo_alpha)
    return orpo(pairs, numbers.beta)
