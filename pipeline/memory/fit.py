"""Whether a stage fits its device, and the smallest change of the recipe with which it would."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import launch
from pipeline.config.methods import METHODS
from pipeline.config.recipe import Recipe, load
from pipeline.config.schema import Frozen, Ppo, Stage, Supervised
from pipeline.errors import UserError
from pipeline.memory.phases import Kind, Need, estimate
from pipeline.memory.zero import Engine

SPARE = 0.1
"""The part of a device that a copy for rollouts leaves free."""

TOGETHER = 2
"""As many changes are tried in all combinations; more of them one after the other."""

Change = tuple[str, list[str]]
"""(What changes, the `--set` overrides that change it.)"""

NAMES = {"cache": "the rollouts' key-value cache", "copy": "the copy with the adapter merged", "framework": "libraries"}

LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says what a container may use: a number, or `max`."""

MEANT = ("quantization", "method", "ranks", "length")
"""Changes after which it is another training or another machine: tried when no other helps."""


@dataclass(frozen=True)
class Device:
    """What a rank has: bytes of a GPU, or its share of a host's memory."""

    kind: Kind
    bytes: float
    name: str


def device(recipe: Recipe, stage: str, gib: float | None = None) -> Device:
    """The device of a stage's ranks: a GPU of `gib` GiB, else the smallest GPU that this machine lets it see, else its memory
    over the ranks of a host. Asks the driver and the kernel, not torch."""
    if gib is not None:
        return Device("cuda", gib * 2**30, f"a GPU of {gib:g} GiB")
    if launch.devices() is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or UUIDs, as the driver's own tool takes them
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        asked += ["-i", visible] if visible else []
        listed = subprocess.run(asked, capture_output=True, text=True, check=False)  # nosec B603 # fixed, but for GPUs' names
        sizes = [int(size) for size in listed.stdout.split() if size.isdigit()]
        if sizes:
            return Device("cuda", min(sizes) * 2**20, "this machine's GPU")
    ranks = recipe.stages[stage].deepspeed.num_gpus
    return Device("cpu", _memory() / ranks, f"this machine's memory for each of {ranks} ranks")


def _memory() -> int:
    """Bytes of this machine, or of the container that this process lives in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = LIMIT.read_text(encoding="utf-8").strip() if LIMIT.is_file() else "max"
    return min(whole, int(limit)) if limit.isdigit() else whole


def fits(recipe: Recipe, stage: str, where: Device, configs: Path | None = None, *, merged: bool = False) -> bool:
    """Whether every phase of a stage fits; `merged` as in `estimate`."""
    return estimate(recipe, stage, configs, where.kind, merged=merged).bytes <= where.bytes


def merged_copy_fits(recipe: Recipe, stage: str, total: float, kind: Kind, configs: Path | None = None) -> bool:
    """What `sampling.adapter: auto` asks: whether a copy of the policy with its adapter merged fits beside all else into
    `total` bytes, with some to spare: a plan that is a little low must not cost the run."""
    return fits(recipe, stage, Device(kind, total * (1 - SPARE), ""), configs, merged=True)


def check_rollout(recipe: Recipe, stage: str, where: Device, configs: Path | None = None) -> None:
    """Raise UserError when the slots of a PPO stage's rollouts, with all that lies beside them, do not fit the device."""
    block = recipe.stages[stage]
    assert isinstance(block, Ppo)
    parts = estimate(recipe, stage, configs, where.kind).phases["rollout"]
    if parts.total <= where.bytes:
        return
    slots = min(block.sampling.batch, block.rollout_batch // block.deepspeed.ranks)
    possible = next(
        (n for n in range(slots - 1, 0, -1) if _of_slots(recipe, stage, n, where, configs) <= where.bytes), 0
    )
    raise UserError(
        recipe.where("stages", stage, "sampling", "batch"),
        f"rollouts of {slots} responses at a time need {parts.total / 2**30:.2f} GiB on each rank, "
        f"{parts.cache / 2**30:.2f} of them for {NAMES['cache']}",
        expected=f"at most {where.bytes / 2**30:.2f} GiB: {where.name}",
        fix=f"write `batch: {possible}`" if possible > 0 else "lower max_response_length, or use a larger device",
    )


def _of_slots(recipe: Recipe, stage: str, slots: int, where: Device, configs: Path | None) -> float:
    """Bytes of the rollout phase with `slots` responses at a time."""
    block = recipe.stages[stage]
    assert isinstance(block, Ppo)
    fewer = block.model_copy(update={"sampling": block.sampling.model_copy(update={"batch": slots})})
    changed = replace(recipe, stages={**recipe.stages, stage: fewer})
    return estimate(changed, stage, configs, where.kind).phases["rollout"].total


def check(recipe: Recipe, stage: str, where: Device, given: list[str], configs: Path | None = None) -> None:
    """Raise UserError, with the nearest change of the recipe that fits, for a stage that does not. `given` are the overrides
    with which `recipe` was loaded."""
    need = estimate(recipe, stage, configs, where.kind)
    if need.bytes <= where.bytes:
        return
    found = nearest(recipe, stage, where, given, configs)
    parts = need.phases[need.peak]
    most = max(vars(parts), key=lambda name: float(getattr(parts, name)))
    raise UserError(
        recipe.where("stages", stage),
        f"needs {need.gib:.2f} GiB on each rank in its phase `{need.peak}`, {getattr(parts, most) / 2**30:.2f} of them for "
        f"{NAMES.get(most, most)}",
        expected=f"at most {where.bytes / 2**30:.2f} GiB: {where.name}",
        fix=" ".join(f"--set {override}" for override in found[0]) + f" needs {found[1].gib:.2f} GiB"
        if found
        else "no setting is small enough: use a larger device or a smaller base",
    )


def nearest(
    recipe: Recipe, stage: str, where: Device, given: list[str], configs: Path | None = None
) -> tuple[list[str], Need] | None:
    """The fewest changes, the mildest first, with which the stage fits; its need then. None when nothing helps.

    What leaves the training as it is goes before all else, several such changes before one that does not.
    """
    changes = list(_changes(recipe, stage, where))
    for some in ([change for change in changes if change[0] not in MEANT], changes):
        for count in range(1, TOGETHER + 1):
            for chosen in itertools.combinations(some, count):
                if len({key for key, _ in chosen}) == count:
                    overrides = [override for _, more in chosen for override in more]
                    need = _with(recipe, stage, where, given + overrides, configs)
                    if need is not None and need.bytes <= where.bytes:
                        return overrides, need
        if found := _one_after_the_other(recipe, stage, where, given, configs, some):
            return found
    return None


def _one_after_the_other(
    recipe: Recipe, stage: str, where: Device, given: list[str], configs: Path | None, changes: list[Change]
) -> tuple[list[str], Need] | None:
    """Every change that lowers the need, until it fits; then without those that were not needed after all."""
    kept: dict[str, list[str]] = {}
    best = estimate(recipe, stage, configs, where.kind)
    for key, more in changes:
        tried = kept | {key: more}
        need = _with(recipe, stage, where, given + _flat(tried), configs)
        if need is not None and need.bytes < best.bytes:
            kept, best = tried, need
        if best.bytes <= where.bytes:
            break
    if best.bytes > where.bytes:
        return None
    for key in list(kept):
        fewer = {other: more for other, more in kept.items() if other != key}
        need = _with(recipe, stage, where, given + _flat(fewer), configs)
        if need is not None and need.bytes <= where.bytes:
            kept, best = fewer, need
    return _flat(kept), best


def _flat(changes: dict[str, list[str]]) -> list[str]:
    return [override for more in changes.values() for override in more]


def _with(recipe: Recipe, stage: str, where: Device, overrides: list[str], configs: Path | None) -> Need | None:
    """The stage's need with overrides; None where the recipe refuses them."""
    try:
        return estimate(load(recipe.path, overrides), stage, configs, where.kind)
    except UserError:
        return None


def _changes(recipe: Recipe, stage: str, where: Device) -> Iterator[Change]:
    """What can be changed, from what costs nothing but time to what changes the training or the machine."""
    block, own = recipe.stages[stage], f"stages.{stage}"
    if getattr(block, "gradient_checkpointing", True) is False:
        yield "checkpointing", [f"{own}.gradient_checkpointing=true"]
    for size in _smaller_micro_batches(block):
        yield "micro_batch", [f"{own}.micro_batch={size}"]
    sampling = getattr(block, "sampling", None)
    if sampling is not None:
        for size in _halves(sampling.batch):
            yield "sampling.batch", [f"{own}.sampling.batch={size}"]
        if sampling.adapter == "merged":
            yield "sampling.adapter", [f"{own}.sampling.adapter=unmerged"]
    if not isinstance(block, Frozen):
        level = Engine.of(recipe, stage, 4, 1, cpu=True).level
        for better in (2, 3):
            if level < better and block.deepspeed.ranks > 1:
                yield "zero", [f"{own}.deepspeed.config=zero{better}"]
        if where.kind == "cuda":
            yield "zero", [f"{own}.deepspeed.config=zero3_offload"]
    if block.base.quantization is None and METHODS[block.adapter.method].four_bit:
        dtype = [] if block.base.dtype == "bf16" else ["base.dtype=bf16"]
        yield "quantization", ["base.quantization=nf4", *dtype]
    if block.adapter.is_full:
        yield "method", ["adapter.method=lora"]
    if where.kind == "cuda" and not isinstance(block, Frozen):
        for times in (2, 4, 8, 16):
            yield "ranks", [f"{own}.deepspeed.num_gpus={block.deepspeed.num_gpus * times}"]
    if sampling is not None:
        for length in _halves(sampling.max_response_length):
            yield "length", [f"{own}.sampling.max_response_length={length}"]


def _smaller_micro_batches(block: Stage) -> list[int]:
    """Micro-batches below the recipe's that divide a rank's share, the largest first."""
    if not isinstance(block, Supervised | Ppo):
        return []
    batch = block.batch if isinstance(block, Supervised) else block.rollout_batch // block.minibatches
    share = batch // block.deepspeed.ranks
    now = block.micro_batch or 16
    sizes = [size for size in range(min(share, 16), 0, -1) if share % size == 0]
    return [size for size in sizes if size < min(now, sizes[0] + (block.micro_batch is not None))]


def _halves(number: int) -> list[int]:
    found: list[Any] = []
    while number > 1:
        number //= 2
        found.append(number)
    return found
