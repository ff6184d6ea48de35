"""Bytes per rank before anything is loaded, and what to change in a recipe whose stages do not fit."""

from pipeline.memory.fit import Device, check, device, fits, merged_copy_fits
from pipeline.memory.phases import Need, Parts, estimate
from pipeline.memory.shape import Linear, Shape, read, shape

__all__ = [
    "Device",
    "Linear",
    "Need",
    "Parts",
    "Shape",
    "check",
    "device",
    "estimate",
    "fits",
    "merged_copy_fits",
    "read",
    "shape",
]
