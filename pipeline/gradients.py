"""Gradients between the backward pass and the optimizer's step, and float32 masters after it, wherever a ZeRO stage keeps
them.

DeepSpeed's own `safe_set_full_*` fail under ZeRO-3 for a parameter whose size is no multiple of the ranks; these do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_local_fp32_param,
    safe_set_local_grad,
)
from torch import Tensor, nn

from pipeline.errors import Trouble


def loss_scale(engine: Any) -> float:
    """What gradients are multiplied by until the optimizer's step: 1 except in fp16."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


class LossScale:
    """Watches the loss scale of fp16 around each optimizer step: DeepSpeed leaves a step out when a gradient overflows, and
    lowers the scale; at the smallest it would end with a bare exception."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def before_step(self) -> None:
        scaler = self.engine.optimizer.loss_scaler  # another object after a resume
        scaler.raise_error_at_min_scale = False
        self.at_minimum = scaler.dynamic and scaler.cur_scale <= scaler.min_scale

    def after_step(self) -> None:
        """Raises Trouble, on every rank, for a step that overflowed although the scale could get no smaller."""
        if self.at_minimum and not self.engine.was_step_applied():
            raise Trouble(
                f"a gradient overflows in fp16 with the loss scale at its minimum, {loss_scale(self.engine):g}; "
                f"{self.engine.skipped_steps} steps were left out\n  fix: write `dtype: bf16` under `base`, or lower `lr`"
            )

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": loss_scale(self.engine), "skipped_steps": float(self.engine.skipped_steps)}


def stop_on_not_finite(engine: Any, stop: Callable[[str], None]) -> None:
    """Call `stop`, on every rank, before a group of parameters is updated with a gradient that is not finite."""

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.tensor(float(all(bool(grad.isfinite().all()) for grad in grads)), device=engine.device)
        if engine.zero_optimization_stage() > 0 and dist.get_world_size() > 1:  # each rank steps its own part
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            stop("a gradient is not finite")

    engine.basic_optimizer.register_step_pre_hook(check)


def whole(parameter: nn.Parameter) -> Tensor:
    """The gradient, averaged over ranks: a float32 copy on every rank. Collective."""
    found = safe_get_full_grad(parameter)
    if found is None:  # no backward pass reached it
        return torch.zeros(shape(parameter), device=parameter.device)
    return found.detach().to(torch.float32, copy=True).reshape(shape(parameter))


def add(parameter: Any, extra: Tensor) -> None:
    """Add `extra`, the same on every rank and of the parameter's shape, to the gradient."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if hasattr(parameter, "ds_id"):
        own = safe_get_local_grad(parameter)
        safe_set_local_grad(parameter, own + own_part(parameter, extra).to(own))
    elif getattr(parameter, "_hp_grad", None) is not None:
        # ZeRO-1 of bf16 weights with float32 accumulation: whole on every rank.
        parameter._hp_grad.add_(extra.reshape(parameter._hp_grad.shape))
    elif mapping is not None:
        own, address = mapping.get_lp_grad_fragment(parameter._index_in_param_group), mapping.lp_fragment_address
        own.add_(extra.flatten().narrow(0, address.start, address.numel).reshape(own.shape).to(own))
        if mapping.use_offload:  # its norm was taken as it was copied
            optimizer = parameter._zero_optimizer
            optimizer.norm_for_param_grads[optimizer.get_param_id(parameter)] = own.double().norm()
    elif not hasattr(parameter, "_hp_mapping"):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(extra)


def square(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Sum of squares of the gradients' parts that are this rank's: float32, a scalar on `device`."""
    total = torch.zeros((), device=device)
    for parameter in parameters:
        own = _own_gradient(parameter)
        if own is not None:
            total = total + own.float().pow(2).sum().to(device)
    return total


def _own_gradient(parameter: Any) -> Tensor | None:
    mapping = getattr(parameter, "_hp_mapping", None)
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter)
    if mapping is not None:
        own, address = mapping.get_lp_grad_fragment(parameter._index_in_param_group), mapping.lp_fragment_address
        return own if own.numel() == address.numel else own.flatten().narrow(0, address.start, address.numel)
    return None if hasattr(parameter, "_hp_mapping") else parameter.grad


def drop(engine: Any, dropped: dict[Any, Tensor]) -> None:
    """Set to zero what is true in `dropped`, of a parameter's shape and the same on every rank, in the parameter and in its
    float32 master."""
    beside = masters_beside(engine.optimizer)
    with torch.no_grad():
        for parameter, where in dropped.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if hasattr(parameter, "ds_id"):
                own = own_part(parameter, where)
                parameter.ds_tensor.masked_fill_(own, 0.0)
                master = safe_get_local_fp32_param(parameter)
                safe_set_local_fp32_param(parameter, master.masked_fill(own.to(master.device), 0.0))
                if parameter.shape != where.shape:
                    continue  # it is whole nowhere
            elif id(parameter) in beside:
                beside[id(parameter)].masked_fill_(where, 0.0)
            elif mapping is not None:
                address, master = mapping.lp_fragment_address, mapping.hp_fragment
                own = where.flatten().narrow(0, address.start, address.numel).to(master.device)
                master.masked_fill_(own.reshape(master.shape), 0.0)
            parameter.masked_fill_(where, 0.0)


def masters_beside(optimizer: Any) -> dict[int, Tensor]:
    """Without ZeRO, the float32 masters of 16-bit parameters by the parameters' ids; empty where there are none."""
    found: dict[int, Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # whole, and in the same order as the parameters
        for light, heavy in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            found |= {id(low): high for low, high in zip(light, heavy, strict=True)}
    return found


def shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; under ZeRO-3 a sharded one shows size 0."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part, flat, of a whole value of a parameter under ZeRO-3; the last ones are padded with zeros."""
    size, ranks = parameter.ds_tensor.numel(), dist.get_world_size(parameter.ds_process_group)
    padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    return padded.narrow(0, rank_of(parameter) * size, size).to(parameter.ds_tensor.device)


def rank_of(parameter: Any) -> int:
    """This rank among those that share a parameter under ZeRO-3."""
    return dist.get_rank(parameter.ds_process_group)
