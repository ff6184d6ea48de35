"""What DeepSpeed holds beside the weights: gradients, master weights, moments, buckets, and what a step takes for a while.

Each number says where DeepSpeed 0.19 allocates it. Sharding is that of Rajbhandari et al. 2020 (arXiv 1910.02054, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.recipe import Recipe, deepspeed_config
from pipeline.config.schema import Frozen, Ppo

ALLREDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed flattens into one tensor to average them without ZeRO."""


@dataclass(frozen=True)
class Engine:
    """A stage's DeepSpeed settings. `size` is bytes of a weight; `cpu` is ranks on CPUs, over gloo."""

    level: int
    ranks: int
    size: int
    moments: int
    accumulation: int
    bucket: int
    prefetch: int
    persistent: int
    overlap: bool
    offload_states: bool
    offload_weights: bool
    cpu: bool

    @classmethod
    def of(cls, recipe: Recipe, stage: str, size: int, accumulation: int, *, cpu: bool) -> Engine:
        block = recipe.stages[stage]
        settings: dict[str, Any] = {}
        if not isinstance(block, Frozen):  # there each rank holds its models whole
            settings = deepspeed_config(recipe, stage).get("zero_optimization", {})
        # On CPUs the offloaded states lie in the same memory.
        off = [settings.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")]

        def number(key: str, default: int) -> int:
            value = settings.get(key, default)
            return default if value == "auto" else int(float(value))

        return cls(
            level=int(settings.get("stage", 0)),
            ranks=block.deepspeed.ranks,
            size=size,
            moments=0 if isinstance(block, Ppo) and block.optimizer == "sgd" else 8,
            accumulation=accumulation,
            bucket=number("reduce_bucket_size", ALLREDUCE_ELEMENTS),
            prefetch=number("stage3_prefetch_bucket_size", 50_000_000),
            persistent=number("stage3_param_persistence_threshold", 100_000),
            overlap=settings.get("overlap_comm") is True,
            offload_states=off[0] and not cpu,
            offload_weights=off[1] and not cpu,
            cpu=cpu,
        )

    def share(self, level: int) -> int:
        """Among how many ranks something is divided that ZeRO divides from `level` on."""
        return self.ranks if self.level >= level else 1

    def resident(self, trained: int) -> float:
        """Master weights and moments of `trained` parameters, as they are after the first step."""
        if self.offload_states:
            return 0.0
        # ZeRO clones what it partitions, float32 or not; without ZeRO only 16-bit weights have masters.
        master = 4 if self.level or self.size < 4 else 0
        return trained * (master + self.moments) / self.share(1)

    def setting_up(self, groups: list[int]) -> float:
        """Optimizer states while the engine is built. ZeRO-1 and 2 flatten a group beside its weights; for 16-bit weights
        without ZeRO a step of zero gradients makes the moments."""
        if self.offload_states:
            return 0.0
        if self.level == 0:
            return float(sum(groups) * (4 + self.moments + 4)) if self.size < 4 else 0.0
        flat = max(groups, default=0) * self.size if self.level < 3 else 0
        return sum(groups) * 4 / self.ranks + flat

    def held(self, trained: int) -> float:
        """Gradient buffers that are there in every phase: ZeRO-3's partition, and its bucket once it was filled."""
        if self.level < 3:
            return 0.0
        partition = 0 if self.offload_states else trained / self.ranks
        return (partition + self._filled(trained)) * self.size

    def _filled(self, trained: int) -> int:
        """Elements of one bucket that gradients come to. `engine.fit_buckets` makes none larger than what trains."""
        return min(self.bucket, trained)

    def accumulated(self, trained: int) -> float:
        """Gradients that wait for the rest of their batch while the last micro-batch runs."""
        if self.level >= 3 or self.accumulation == 1:
            return 0.0
        if self.level == 2 and self.offload_states:
            return 0.0
        return trained * self.size / self.share(2)

    def buckets(self, trained: int) -> float:
        """Buckets of ZeRO-1 and 2 that lie ready from a backward pass's first gradient on. CPU memory that nothing has
        been written to takes no room, and on CPUs the pages fill as the activations go."""
        if self.level not in (1, 2) or self.cpu:
            return 0.0
        return self._filled(trained) * self.size * (2 if self.overlap else 1)

    def reducing(self, trained: int) -> float:
        """Gradients, buckets and their flat copies at the end of a backward pass, when they are averaged over the ranks."""
        filled = self._filled(trained)
        if self.level == 0:
            return trained * self.size + (min(trained, ALLREDUCE_ELEMENTS) * self.size if self.ranks > 1 else 0)
        if self.level == 3:
            # The interleaved copy that is scattered; gloo's reduce-scatter works on a copy of that.
            return filled * self.size * (2 if self.cpu else 1)
        whole = trained * self.size if self.level == 1 and self.accumulation > 1 else 0  # until they are in the bucket
        own = 0.0 if self.offload_states or self.level == 1 else trained * self.size / self.ranks
        before = own if self.accumulation > 1 else 0.0
        full = filled * self.size
        # A bucket's flat copy is gone again when this rank's part of it is kept. With overlap the next one fills meanwhile.
        if not self.cpu:
            return max((2 if self.overlap else 1) * full + max(full, own) + before, whole)
        after = min(trained - filled, filled) * self.size if self.overlap else 0
        return max(2 * full + before, full + after + max(after, own) + before, whole)

    def left(self, trained: int) -> float:
        """Share of the activations still there when the first bucket is full: none if that holds all gradients."""
        return max(0.0, 1.0 - self.bucket / trained) if self.level and trained else 0.0

    def stepping(self, groups: list[int], largest: int) -> tuple[float, float]:
        """(gradients; their flat and float32 copies and Adam's temporaries) where a step takes most: ZeRO steps one role's
        group after the other.

        torch's Adam takes the root of the second moment and divides it, each a new tensor: of one parameter without ZeRO,
        of the group's whole partition with it. On GPUs it works on all parameters of a group at once, with one temporary.
        """
        if self.offload_states:
            return 0.0, 0.0
        trained = sum(groups)
        temporaries = (2 if self.cpu else 1) * 4 if self.moments else 0
        if self.level == 0:
            widest = min(largest, trained) if self.cpu else max(groups)
            return float(trained * self.size), float((4 * trained if self.size < 4 else 0) + temporaries * widest)
        copy = self.size + (4 if self.size < 4 else 0)
        steps = []
        for number, group in enumerate(groups):
            waiting = 0 if self.level == 3 else sum(groups[number:]) * self.size / self.share(2)
            steps.append((waiting, group * (copy + temporaries) / self.ranks))
        return max(steps, key=sum)

    def gathered(self, parameters: float, largest: int) -> float:
        """Whole weights that ZeRO-3 has gathered at a time in a pass through `parameters` sharded ones: what it prefetches,
        and the tensors made from that."""
        if self.level < 3:
            return 0.0
        return 2.0 * max(min(parameters, self.prefetch), largest) * self.size
