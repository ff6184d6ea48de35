"""Resume on another number of ranks or under another ZeRO stage: shard files of one size, into an engine of another.

DeepSpeed itself loads only what as many ranks saved under the same stage, and its universal checkpoints leave out engines
without ZeRO. Here every rank reads all shard files, finds the float32 weights and the optimizer's moments of each trained
parameter in them, and copies those parts that it keeps itself; float32 values are copied bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from torch.serialization import safe_globals

from pipeline import gradients
from pipeline.errors import UserError


@dataclass(frozen=True)
class Part:
    """`count` elements of a parameter from its element `start` on. They lie from element `at` on in `weights`, a flat float32
    tensor, and in those tensors of the optimizer's `state` that have as many elements."""

    weights: Tensor
    state: dict[str, Any]
    at: int
    start: int
    count: int


class Saved:
    """The trained parameters of a checkpoint by name, from the shard files of all its ranks (mapped, not read at once)."""

    def __init__(self, folder: Path, groups: list[list[tuple[str, nn.Parameter]]]) -> None:
        """`groups` are the engine's own, in whose order an engine without ZeRO has saved."""
        ranks = sorted(
            folder.glob("*_optim_states.pt"), key=lambda path: int(path.name.partition("pp_rank_")[2].split("_")[0])
        )
        self.model = _read(next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt")))))
        self.shards = [_read(path)["optimizer_state_dict"] for path in ranks] or [self.model["optimizer"]]
        self.parts: dict[str, list[Part]] = defaultdict(list)
        if ranks and len(ranks) != self.model["dp_world_size"]:
            raise UserError(
                str(folder),
                f"holds the shards of {len(ranks)} of {self.model['dp_world_size']} ranks",
                expected="all of them, to go on with another number of ranks",
                fix="go on with the number of ranks that saved it, or gather the files of all hosts",
            )
        for shard in self.shards:
            self._add(shard, groups)

    def _add(self, shard: dict[str, Any], groups: list[list[tuple[str, nn.Parameter]]]) -> None:
        """The parts that one rank has saved."""
        state = _optimizer(shard)["state"]
        if "fp32_flat_groups" in shard:  # ZeRO-3: an equal share of every parameter, the last ones padded
            for index, (flat, shapes) in enumerate(
                zip(shard["fp32_flat_groups"], self.model["param_shapes"], strict=True)
            ):
                at, ranks = 0, len(self.shards)
                for name, shape in shapes.items():
                    share = -(-shape.numel() // ranks)
                    self._append(name, flat, state.get(index, {}), at, min(share, shape.numel() - self._found(name)))
                    at += share
        elif "param_slice_mappings" in shard:  # ZeRO-1 and 2: each rank's stretch of all parameters laid end to end
            flats = shard["single_partition_of_fp32_groups"]
            for index, (flat, slices) in enumerate(zip(flats, shard["param_slice_mappings"], strict=True)):
                for name, where in slices.items():
                    self._append(name, flat, state.get(index, {}), where.start, where.numel)
        else:  # no ZeRO: whole
            index = 0
            for number, group in enumerate(groups):
                for place, (name, _) in enumerate(group):
                    heavy = (
                        shard["fp32_groups"][number][place] if "fp32_groups" in shard else self.model["module"][name]
                    )
                    self._append(name, heavy.flatten(), state.get(index, {}), 0, heavy.numel())
                    index += 1

    def _append(self, name: str, flat: Tensor, state: dict[str, Any], at: int, count: int) -> None:
        self.parts[name].append(Part(flat, state, at, self._found(name), max(count, 0)))

    def _found(self, name: str) -> int:
        return sum(part.count for part in self.parts[name])

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Learning rates and what else the optimizer keeps for each of its groups."""
        return list(_optimizer(self.shards[0])["param_groups"])

    def weights(self, name: str) -> Tensor:
        """A parameter's float32 weights, flat."""
        return torch.cat([part.weights.detach().flatten()[part.at : part.at + part.count] for part in self.parts[name]])

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer's tensors for a parameter, flat, by key."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for part in self.parts[name]:
            for key, value in part.state.items():
                if torch.is_tensor(value) and value.dim():
                    found[key].append(value.flatten()[part.at : part.at + part.count])
        return {key: torch.cat(values) for key, values in found.items()}

    def counters(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps once and not for each element, such as Adam's `step`."""
        state = self.parts[name][0].state
        return {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in state.items()
            if value is not None and not (torch.is_tensor(value) and value.dim())
        }


@torch.no_grad()
def load(engine: Any, folder: Path) -> None:
    """Put what DeepSpeed saved in `folder`, by ranks of any number under any ZeRO stage, into `engine`. Collective."""
    groups = [[(engine.param_names[p], p) for p in group] for group in _groups(engine)]
    saved, states = Saved(folder, groups), engine.basic_optimizer.state
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()
    for number, group in enumerate(groups):
        for place, (name, parameter) in enumerate(group):
            if sum(part.count for part in saved.parts.get(name, [])) != gradients.shape(parameter).numel():
                raise UserError(
                    str(folder),
                    f"does not hold {name} as this stage trains it",
                    fix="go on with the ranks and the DeepSpeed configuration that saved it",
                )
            whole = saved.weights(name)
            for part in _kept(engine, number, place, parameter, states):
                _own(part.weights, part).copy_(whole[part.start : part.start + part.count])
                for key, value in saved.moments(name).items():
                    held = part.state.setdefault(key, torch.zeros_like(part.weights.detach()))
                    _own(held, part).copy_(value[part.start : part.start + part.count])
                part.state.update(saved.counters(name))
            _set(parameter, whole)
    _go_on(engine, saved)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()


def _own(flat: Tensor, part: Part) -> Tensor:
    return flat.data.view(-1).narrow(0, part.at, part.count)


def _set(parameter: Any, whole: Tensor) -> None:
    """The weights that the model computes with, in their own dtype; under ZeRO-3 this rank's part of them."""
    if hasattr(parameter, "ds_id"):
        parameter.ds_tensor.copy_(gradients.own_part(parameter, whole))
    else:
        parameter.copy_(whole.view(parameter.shape))


def _groups(engine: Any) -> list[list[nn.Parameter]]:
    """The trained parameters by group of the optimizer, in the order in which every size keeps them."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(engine.optimizer, name):
            return [list(group) for group in getattr(engine.optimizer, name)]
    return [list(group["params"]) for group in engine.optimizer.param_groups]


def _kept(engine: Any, number: int, place: int, parameter: Any, states: Any) -> Iterator[Part]:
    """Where this rank keeps its part, if any, of the parameter at `place` of group `number`."""
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_id"):
        flat, share = optimizer.fp32_partitioned_groups_flat[number], parameter.ds_tensor.numel()
        at = sum(before.ds_tensor.numel() for before in optimizer.fp16_groups[number][:place])
        start = min(gradients.rank_of(parameter) * share, parameter.ds_numel)
        yield Part(flat, states[flat], at, start, min(share, parameter.ds_numel - start))
    elif hasattr(parameter, "_hp_mapping"):
        if (mapping := parameter._hp_mapping) is not None:
            flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            flat, here = flats[number], mapping.get_hp_fragment_address()
            yield Part(flat, states[flat], here.start, mapping.lp_fragment_address.start, here.numel)
    else:
        heavy = optimizer.fp32_groups[number][place] if hasattr(optimizer, "fp32_groups") else parameter
        yield Part(heavy, states[heavy], 0, 0, heavy.numel())


def _go_on(engine: Any, saved: Saved) -> None:
    """Learning rates, their schedule, the loss scale, the counts of steps, and buffers of the model."""
    for group, before in zip(engine.basic_optimizer.param_groups, saved.groups, strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})
    if engine.lr_scheduler is not None and saved.model["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(saved.model["lr_scheduler"])
    if (scaler := saved.shards[0].get("loss_scaler")) is not None and hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler = scaler
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.model[name])
    for name, buffer in engine.module.named_buffers():
        if name in saved.model["module"]:
            buffer.copy_(saved.model["module"][name])


def _optimizer(shard: dict[str, Any]) -> dict[str, Any]:
    """The state of the optimizer that DeepSpeed wraps, as torch saves it."""
    return dict(shard.get("base_optimizer_state") or shard.get("optimizer_state_dict") or shard)


def _read(path: Path) -> dict[str, Any]:
    """DeepSpeed's file, of whose own classes these are all that it holds."""
    with safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
