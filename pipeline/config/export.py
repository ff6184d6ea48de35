"""The block of an export stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from pipeline.config.block import Dtype
from pipeline.config.schema import Frozen


class Export(Frozen):
    """The policy of a stage as a full model that needs nothing else: 4-bit weights dequantised, the adapter merged, once and in
    float32, then rounded to `dtype` (the base's unless given)."""

    kind: Literal["export"]
    policy: str
    dtype: Dtype | None = None

    @field_validator("adapter", mode="before")
    @classmethod
    def _is_a_full_model(cls, given: Any) -> Any:
        """Whatever adapter the recipe trains, what this stage hands on has none."""
        return {"method": "full"}
