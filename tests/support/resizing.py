"""Stop a stage at a step and resume it under another size: what its engine holds at the save and right after the load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def run(recipe: str, stage: str, run_dir: str, config: str, stop: int | None, folder: str) -> bool:
    """Run the stage under the DeepSpeed configuration `config` and stop after step `stop`, or at its end; whether it stopped.

    What the engine holds as it loads a checkpoint of another size is kept in `folder` as `loaded.npz`; as it saves, in
    `saved.npz`, so that the last save is what stays.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from pipeline import resize
    from pipeline.stage import Context, Stopped
    from tests.support import stages

    save, load, asked = deepspeed.DeepSpeedEngine.save_checkpoint, resize.load, [0]
    Path(folder).mkdir(parents=True, exist_ok=True)

    def saving(engine: Any, *args: Any, **kwargs: Any) -> Any:
        keep(engine, Path(folder, "saved.npz"))
        return save(engine, *args, **kwargs)

    def loading(engine: Any, checkpoint: Path) -> None:
        load(engine, checkpoint)
        keep(engine, Path(folder, "loaded.npz"))

    def stop_requested(context: Context) -> bool:
        asked[0] += 1
        return asked[0] == stop

    with (
        patched(deepspeed.DeepSpeedEngine, "save_checkpoint", saving),
        patched(resize, "load", loading),
        patched(Context, "stop_requested", stop_requested),
        patched(type(get_accelerator()), "is_fp16_supported", lambda self: True),  # as tests/support/numbers.py says
    ):
        try:
            stages.run(recipe, stage, run_dir, [f"deepspeed.config={config}"])
        except Stopped:
            return True
    return False


@contextmanager
def patched(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def keep(engine: Any, file: Path) -> None:
    arrays = held(engine)
    if int(os.environ["RANK"]) == 0:
        np.savez(file, **arrays)


def held(engine: Any) -> Arrays:
    """By trained parameter: float32 `weights`, `exp_avg`, `exp_avg_sq`, gathered by DeepSpeed's own functions (an engine
    without ZeRO keeps them whole), and `model`, what it computes with; beside them steps and learning rates. Collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, states = engine.optimizer, engine.basic_optimizer.state
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed's step finds the moments of its first group only, and does not look again.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    beside = {}
    for light, heavy in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False):
        beside |= {id(low): high for low, high in zip(light, heavy, strict=True)}
    found: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[f"{name}/model"] = parameter.detach().float().clone()
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            found[f"{name}/weights"] = safe_get_full_fp32_param(parameter)
            found |= {f"{name}/{k}": safe_get_full_optimizer_state(parameter, k) for k in ("exp_avg", "exp_avg_sq")}
        else:
            whole = beside.get(id(parameter), parameter)
            found[f"{name}/weights"] = whole.detach().clone()
            found |= {f"{name}/{k}": states[whole][k].clone() for k in ("exp_avg", "exp_avg_sq")}
    arrays = {name: value.cpu().numpy() for name, value in found.items()}
    steps = {float(state["step"]) for state in states.values() if state}
    arrays["step"] = np.array(sorted(steps))
    arrays["lr"] = np.array([group["lr"] for group in engine.basic_optimizer.param_groups])
    arrays["global_steps"] = np.array(engine.global_steps)
    return arrays
