"""Bytes per rank before anything is loaded, and what to change in a recipe whose stages do not fit."""

from pipeline.memory.fit import Device, check, check_rollout, device, fits, merged_copy_fits
from pipeline.memory.phases import Need, Parts, estimate
from pipeline.memory.shape import Linear, Shape, Unknown, read, shape

__all__ = [
    "Device",
    "Linear",
    "Need",
    "Parts",
    "Shape",
    "Unknown",
    "check",
    "check_rollout",
    "device",
    "estimate",
    "fits",
    "merged_copy_fits",
    "read",
    "shape",
]
