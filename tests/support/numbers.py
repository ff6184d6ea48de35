"""Runs in a warm rank whose numbers go wrong: what the stage says as it ends."""

from __future__ import annotations

from typing import Any
from unittest import mock


def poisoned(recipe: str, stage: str, run_dir: str, step: int) -> str:
    """A trained weight is NaN as `step` begins, and so are the loss and the gradients of that step."""
    from pipeline.trainer import Bridge
    from tests.support import stages

    begin = Bridge.on_step_begin

    def on_step_begin(self: Bridge, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        begin(self, args, state, control, **more)
        if state.global_step == step - 1:
            weight = next(p for p in model.parameters() if p.requires_grad)
            weight.data.fill_(float("nan"))
            if hasattr(weight, "ds_id"):  # of which the whole is gathered now and then
                weight.ds_tensor.data.fill_(float("nan"))

    with mock.patch.object(Bridge, "on_step_begin", on_step_begin):
        return stages.refused(recipe, stage, run_dir)


def in_fp16(recipe: str, stage: str, run_dir: str) -> str:
    """DeepSpeed runs fp16 on CPUs although it says that some, whose products are slow then, do not have it."""
    from deepspeed.accelerator import get_accelerator

    from tests.support import stages

    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True):
        return stages.refused(recipe, stage, run_dir)


def poisoned_after(recipe: str, stage: str, run_dir: str, step: int) -> str:
    """A trained weight is NaN once `step` has been made, before it is evaluated and saved."""
    from pipeline.trainer import Bridge
    from tests.support import stages

    end = Bridge.on_step_end

    def on_step_end(self: Bridge, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        end(self, args, state, control, **more)
        if state.global_step == step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    with mock.patch.object(Bridge, "on_step_end", on_step_end):
        return stages.refused(recipe, stage, run_dir)
