"""What all blocks of a recipe have in common: strictness, and the kinds of numbers in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Dtype = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def misplaced(key: str, found: str, known: Iterable[str]) -> PydanticCustomError:
    """An error about `key` of the block being validated, whose value or place should be one of `known`."""
    return PydanticCustomError("misplaced", "{found}", {"key": key, "found": found, "known": list(known)})


def closest(word: str, known: Iterable[str]) -> str:
    """What to write in place of a misspelt word; empty when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"write `{match[0]}`" if match else ""
