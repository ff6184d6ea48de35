"""A student and its teacher side by side: how far apart they are on a text, and what the student itself replies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.adapters.new_rows import plain
from pipeline.config.distill import Distill
from pipeline.generation.rollout import Rollout
from pipeline.model import likelihood
from pipeline.model.roles import Roles
from stages.distill.loss import divergence, log_probs

STUDENT, TEACHER = "student", "teacher"
"""The roles. The teacher's is its adapter's name too, and no part of a parameter's name may be that."""

MEASURES = ("divergence", "forward_kl", "nll")
"""What `Pair.measured` tells of a token: the training loss, KL(teacher || student) at temperature 1, -log of the student's
probability of it."""

OfLogits = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """`roles` holds student and teacher, on one copy of the weights or on two; `sharded` under ZeRO-3, where ranks must call
    the student's modules equally often. Texts are int64 [B, L] without a gap, padded on the right; `labels` [B, L] are -100
    where no loss is taken. Their N other places after the first are the targets, in order of rows and columns."""

    roles: Roles
    block: Distill
    pad: int
    eos: list[int]
    sharded: bool

    def divergences(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The training loss of each target, float32 [N], with gradients for the student."""
        block = self.block

        def apart(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
            width = min(teacher.shape[1], student.shape[1])
            said = [log_probs(logits, width, block.temperature) for logits in (teacher, student)]
            return divergence(said[0], said[1], block.beta)

        return self._read(tokens, labels, apart)

    def measured(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """MEASURES of each target, float32 [N, 3]."""
        block = self.block

        def measure(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
            width = min(teacher.shape[1], student.shape[1])
            said = [log_probs(logits, width, block.temperature) for logits in (teacher, student)]
            plain = [log_probs(logits, width, 1.0) for logits in (teacher, student)]
            nll = -plain[1].gather(1, targets.unsqueeze(1)).squeeze(1)
            forward = divergence(plain[0], plain[1], 0.0)
            return torch.stack([divergence(said[0], said[1], block.beta), forward, nll], dim=1)

        with torch.no_grad():
            return self._read(tokens, labels, measure)

    def replies(self, prompts: list[list[int]], noise: Tensor) -> Rollout:
        """The student's own reply to each prompt, drawn by `noise` (int64 [B], a key for each)."""
        synced, sampling = self.sharded and dist.get_world_size() > 1, self.block.sampling
        with torch.no_grad():
            return self.roles.rollout(STUDENT, prompts, noise, sampling, pad=self.pad, eos=self.eos, synced=synced)

    def _read(self, tokens: Tensor, labels: Tensor, function: OfLogits) -> Tensor:
        """`function` of the teacher's logits [n, V], the student's and the targets [n], for all targets, a chunk at a time;
        with gradients the logits of one of several chunks are computed again in the backward pass."""
        row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        with torch.no_grad():
            states, taught = self.roles.states(TEACHER, tokens)
            states = states[row, column]
        own, head = self.roles.states(STUDENT, tokens)
        inputs = (states, own[row, column], tokens[row, column + 1])

        def chunk(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
            self.roles.use(TEACHER)  # its head too may have an adapter, on the student's
            with torch.no_grad():
                said = taught(teacher)
            self.roles.use(STUDENT)
            return function(said, head(student), targets)

        size = max(1, likelihood.CHUNK_ELEMENTS // int(getattr(plain(head), "out_features", own.shape[-1])))
        learning, trained = torch.is_grad_enabled(), any(p.requires_grad for p in head.parameters())
        chunks = -(-len(row) // size)
        if self.sharded:
            most = torch.tensor([chunks], device=tokens.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            chunks = int(most)
        # ZeRO-3 keeps one gradient of a weight in a backward pass, not a sum over chunks.
        if chunks <= 1 or (learning and self.sharded and trained):
            return chunk(*inputs)
        pieces = []
        for number in range(chunks):
            part = [column[number * size : (number + 1) * size] for column in inputs]
            pieces.append(checkpoint(chunk, *part, use_reentrant=self.sharded) if learning else chunk(*part))
        return torch.cat(pieces)


def through(engine: Any, model: Any, call: Callable[[], Any]) -> Any:
    """What `call` returns, called in the place of `model`'s forward pass through the DeepSpeed `engine` around it: so that
    the engine's hooks, by which ZeRO-3 gathers weights, are where they are in any pass."""
    own = model.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own

    def instead(*_: Any, **__: Any) -> Any:
        restore()
        return call()

    model.forward = instead
    try:
        return engine()
    finally:
        restore()
