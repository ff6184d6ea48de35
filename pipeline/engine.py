"""DeepSpeed: its configuration with what the recipe owns, starting ranks, one optimizer with a group per role, saving."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from pipeline import checkpoint, gradients, resize
from pipeline.config.schema import Dtype, Schedule
from pipeline.errors import Trouble, UserError
from pipeline.extensions import free_builds
from pipeline.watchdog import progress, rest

Value = TypeVar("Value")

OWNED = ("optimizer", "scheduler", "train_batch_size", "fp16", "bf16")
"""Keys that the recipe owns: dropped from a configuration file before the recipe's are laid over it."""


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def overlay(
    config: dict[str, Any], *, dtype: Dtype, micro_batch: int, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """`config` with the recipe's batch, accumulation, clipping and dtype; the optimizer and scheduler are Relay's own.

    `auto` values, which plain DeepSpeed refuses, are dropped: DeepSpeed's defaults take their place.
    """
    kept = _without_auto({key: value for key, value in config.items() if key not in OWNED})
    kept |= {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    kept.setdefault("steps_per_print", 10**9)
    if dtype != "fp32":
        kept[dtype] = {**_without_auto(config.get(dtype, {})), "enabled": True}
    if zero_stage(config) == 3:
        # DeepSpeed steps once per sub-group; a role's norm is one norm only when its parameters are one sub-group.
        kept["zero_optimization"] = {**kept["zero_optimization"], "sub_group_size": 10**12}
    return kept


def fit_buckets(config: dict[str, Any], module: torch.nn.Module) -> None:
    """Lower the communication buckets of `config`, in place, to what `module` trains.

    ZeRO allocates its reduce bucket whole in every step, whatever the size of the gradients: with adapters, hundreds of
    megabytes for nothing.
    """
    # Under ZeRO-3 a sharded parameter shows size 0 and keeps its own in ds_numel.
    trained = sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters() if p.requires_grad)
    zero = config.get("zero_optimization", {})
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if key in zero:
            zero[key] = int(min(zero[key], max(trained, 1)))


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def start(seed: int, deterministic: bool = False) -> torch.device:
    """Join the process group, seed this rank, and return its device. On the CPU all arithmetic is deterministic."""
    quiet()
    progress()
    if deterministic or get_accelerator().device_name() == "cpu":
        repeat_bits()
    if not dist.is_initialized():
        if get_accelerator().device_name() != "cpu":
            get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        free_builds()
        _join()
        _release_shared_buffer()
    seed_all(seed)
    return device()


def _join() -> None:
    """Join the process group. SIGTERM ends this rank meanwhile: there is nothing to save yet, and torch, waiting for a rank
    that will not come, would not let a handler run."""
    held = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cpu = get_accelerator().device_name() == "cpu"
    deepspeed.init_distributed(
        dist_backend="gloo" if cpu else get_accelerator().communication_backend_name(),
        verbose=False,
        timeout=timedelta(days=1),  # the watchdog's limit is the recipe's, and it says which rank hangs
    )
    signal.signal(signal.SIGTERM, held)


def repeat_bits() -> None:
    """From now on the same inputs give the same bits. An operation that has no such form is warned of, and runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())


def _release_shared_buffer() -> None:
    """Remove the name of this rank's all-reduce buffer, which DeepSpeed makes on CPUs: 66 MiB of memory.

    DeepSpeed never removes it, so that every launch on a port of its own would take that much from the machine for good.
    Once all ranks have mapped it the name serves nobody, and the kernel frees the memory when the last of them ends.
    """
    where = [str(os.getuid()), *(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))]
    dist.barrier()
    name = "_".join(["deepspeed_allreduce_buffer", *where])
    Path("/dev/shm", name).unlink(missing_ok=True)  # nosec B108 # DeepSpeed's choice; nothing is read from it


def quiet() -> None:
    """Leave the terminal to the stage's own lines: libraries speak from warnings on, and without progress bars."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|peft|trl)\.")


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    progress()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Value]) -> Value:
    """What `work` returns on rank 0, on every rank; a UserError there is raised on all. The others wait as long as it takes:
    no collective lasts longer than a few seconds, so that none times out."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        rest()
        done = work()
        progress()
        return done
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work) if dist.get_rank() == 0 else None
        while not agreed(running is not None and bool(wait([running], timeout=2.0).done)):
            pass
        value, mistake = None, None
        if running is not None:
            try:
                value = running.result()
            except UserError as error:
                mistake = (error.where, error.found, error.expected, error.fix)
    value, mistake = agreed((value, mistake))
    if mistake is not None:
        raise UserError(*mistake[:2], expected=mistake[2], fix=mistake[3])
    return cast(Value, value)


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """All ranks' rows in rank order, on every rank; columns are padded with zeros to the widest rank's."""
    progress()
    world = dist.get_world_size()
    if world == 1:
        return local
    if local.dim() == 2:
        width = torch.tensor([local.shape[1]], device=local.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        local = torch.nn.functional.pad(local, (0, int(width) - local.shape[1]))
    sent = local.to(torch.uint8) if local.dtype == torch.bool else local
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent.contiguous())
    return torch.cat(parts).to(local.dtype)


def gather_state(named: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Whole parameters by name on the CPU of rank 0 (an empty dict elsewhere); collective under ZeRO-3."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, torch.Tensor] = {}
    for name, parameter in named:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if main:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def masters(engine: Any, named: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole float32 weights of trained parameters, from their float32 master copies wherever a ZeRO stage keeps such.

    Collective; every rank gets every tensor, one at a time.
    """
    beside = gradients.masters_beside(engine.optimizer)
    for name, parameter in named.items():
        if id(parameter) in beside:
            yield name, beside[id(parameter)].detach()
        elif hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, parameter.detach().float()


def learning_rate_factor(schedule: Schedule, step: int, total: int) -> float:
    """What to multiply the peak learning rate by at optimizer step `step` (from 0) of `total`.

    Linear warm-up, then constant, linear to zero or half a cosine to zero: the schedules of transformers.optimization.
    """
    warmup = warmup_steps(schedule, total)
    if step < warmup:
        return step / max(1, warmup)
    if schedule.lr_schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return (
        max(0.0, 1.0 - done) if schedule.lr_schedule == "linear" else max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    )


def warmup_steps(schedule: Schedule, total: int) -> int:
    return math.ceil(schedule.warmup * total) if schedule.warmup < 1 else int(schedule.warmup)


class RoleClipping:
    """Clips the gradient of each role by its own norm, right before the optimizer's step. A role is a parameter group, or
    those with one `role`.

    DeepSpeed clips by one norm over all groups, so that a large critic gradient would shrink the actor's update. Every
    ZeRO stage hands the wrapped optimizer the float32 gradients of this rank's partition just before its step; there the
    norm of a group is the root of the partitions' summed squares. `norms` keeps the last norm of each role by name, and
    `steps` counts the optimizer's steps. Raises Trouble, on every rank and before any weight moves, for a norm that is not
    finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, partitioned: bool) -> None:
        self.partitioned = partitioned
        self.norms: dict[str, float] = {}
        self.steps = 0
        roles = Counter(role_of(group) for group in optimizer.param_groups)
        self._scattered = {
            role: [p for group in optimizer.param_groups if role_of(group) == role for p in group["params"]]
            for role, groups in roles.items()
            if groups > 1
        }
        optimizer.register_step_pre_hook(self._clip)

    def measure(self, engine: Any) -> None:
        """Take the norms of roles that have several groups; after the last backward pass before a step of `engine`.

        ZeRO steps one group at a time, and shows the optimizer no gradients but that one's.
        """
        for role, parameters in self._scattered.items():
            square = gradients.square(parameters, engine.device)
            self.norms[role] = float(self._over_ranks(square).sqrt()) / gradients.loss_scale(engine)

    def _over_ranks(self, square: torch.Tensor) -> torch.Tensor:
        if not (self.partitioned and dist.is_initialized()):
            return square
        communicated = square.to(get_accelerator().current_device_name())
        dist.all_reduce(communicated)
        return communicated.to(square.device)

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        for group in optimizer.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            role = role_of(group)
            if role not in self._scattered:
                device = group["params"][0].device
                squares = [g.float().pow(2).sum() for g in grads]
                square = torch.stack(squares).sum() if grads else torch.zeros((), device=device)
                self.norms[role] = float(self._over_ranks(square).sqrt())
            norm = self.norms[role]
            if not math.isfinite(norm):
                raise Trouble(f"the gradient of the {role} is not finite")
            if group["max_grad_norm"] > 0:
                factor = min(1.0, group["max_grad_norm"] / (norm + 1e-6))
                for grad in grads:
                    grad.mul_(factor)


def role_of(group: dict[str, Any]) -> str:
    """The role whose parameters an optimizer's group holds."""
    return str(group.get("role", group["name"]))


def initialize(module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine over `module` with `optimizer`, whose groups stay as they are."""
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=[p for g in optimizer.param_groups for p in g["params"]],
        config=config,
        dist_init_required=False,
    )
    return engine


@contextmanager
def forward_only(module: torch.nn.Module, config: dict[str, Any]) -> Iterator[Any]:
    """`module` on this rank's device and in evaluation mode, to call without gradients before it trains under `config`.

    Under ZeRO-3 it is an engine that fetches the weights of each module as it is called; its hooks are gone afterwards.
    """
    training, held = module.training, None
    if zero_stage(config) == 3:
        kept = deepcopy({key: value for key, value in config.items() if key not in ("optimizer", "scheduler")})
        kept["zero_optimization"].pop("offload_optimizer", None)
        held, *_ = deepspeed.initialize(model=module, config=kept, dist_init_required=False)
    elif next(module.parameters()).device != device():
        module.to(device())
    module.eval()
    try:
        with torch.no_grad():
            yield held or module
    finally:
        if held is not None:
            held.destroy()
        module.train(training)


def save(
    engine: Any,
    checkpoints: Path,
    step: int,
    state: dict[str, Any],
    sizes: list[dict[str, Any]],
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Save engine, random generators and `state` as `step-N`: beside, completed, renamed. Collective.

    `sizes` are those the training has had; `write` adds files of its own to the folder, on rank 0.
    """
    folder, fresh = checkpoints / f"step-{step}", checkpoints / f"step-{step}.writing"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(fresh), tag="engine", client_state={}, exclude_frozen_parameters=True, save_latest=False)
    torch.save(_random_state(), fresh / f"random-{rank}.pt")
    dist.barrier()

    def complete() -> None:
        if write is not None:
            write(fresh)
        (fresh / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
        checkpoint.complete(fresh, {"step": step, "sizes": sizes})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(fresh, folder)

    on_main(complete)
    return folder


def resume(engine: Any, folder: Path, size: dict[str, Any], seed: int) -> dict[str, Any]:
    """Load what `save` wrote into an engine of the same model under `size`; returns the state.

    DeepSpeed unpickles its files: `checkpoint.damage` must have found none in `folder`.
    """
    random_state = folder / f"random-{dist.get_rank()}.pt"
    if checkpoint.resized(folder, size):
        resize.load(engine, folder / "engine")
    else:
        engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
    if random_state.exists():
        _set_random_state(torch.load(random_state, weights_only=True))
    else:
        seed_new_rank(seed, checkpoint.step_of(folder))
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def seed_new_rank(seed: int, step: int) -> None:
    """Seed a rank that has no part in the checkpoint of `step`: the same whenever that is resumed."""
    seed_all(int(np.random.SeedSequence([seed % 2**32, step, dist.get_rank()]).generate_state(1)[0]))


def _random_state() -> dict[str, Any]:
    """Every generator's state, in types that `torch.load(weights_only=True)` reads."""
    accelerator = get_accelerator()
    name, words, *rest = cast(tuple[Any, ...], np.random.get_state())
    device = accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None
    return {
        "python": random.getstate(),
        "numpy": (name, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": device,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        get_accelerator().set_rng_state(state["device"])
