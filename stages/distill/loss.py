"""The divergence between a teacher's and a student's next-token distribution. Functions of tensors alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.model.likelihood import tempered


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of each token in nats, float32 [N], from log-probabilities float32 [N, V].

    With P the teacher and Q the student, JSD(beta) = beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q
    (Agarwal et al. 2024, arXiv 2306.13649, section 2). It vanishes at both ends; there, as in TRL, `beta` 0 is the forward
    KL(P || Q) and 1 the reverse KL(Q || P), to which JSD(beta) / beta and JSD(beta) / (1 - beta) tend.
    """
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) over the last dimension, from log-probabilities that are finite where a token is impossible."""
    return (first.exp() * (first - second)).sum(-1)


def log_probs(logits: Tensor, width: int, temperature: float) -> Tensor:
    """Log-probabilities float32 [N, width] of the first `width` tokens at a temperature, from logits [N, V] of any float
    dtype. Two models of one tokenizer may have output heads of different widths, padded with rows that no token uses."""
    return torch.log_softmax(tempered(logits[:, :width], temperature), dim=-1)
