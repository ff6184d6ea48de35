"""The block of an evaluate stage: what is tested, beside what, on which data and by which judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.block import Block, Positive
from pipeline.config.schema import Frozen, FunctionName, Sampling, Source
from pipeline.config.selection import Scorer


class Policy(Block):
    """A policy to test: an earlier `stage` (or `base`), or the `model` of a hub id or a folder, be it a full model or a PEFT
    adapter."""

    stage: str | None = None
    model: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Policy:
        if (self.stage is None) == (self.model is None):
            raise ValueError("give the name of an earlier stage, or `model` for another policy, and not both")
        return self

    @property
    def name(self) -> str:
        """What metrics call it: the stage, or the last part of the model's id or folder."""
        return self.stage or str(self.model).rstrip("/").rpartition("/")[2]


def by_stage(value: Any) -> Any:
    """A name alone is a stage's."""
    return {"stage": value} if isinstance(value, str) else value


Tested = Annotated[Policy, BeforeValidator(by_stage)]
Judging = Annotated[Scorer, BeforeValidator(by_stage)]


class Evaluate(Frozen):
    """Tests what the run made.

    With `prompts`, replies of `model` stand beside those of `against` on the held-out ones, scored by the reward models
    `reward` and by the Python function `judge`.
    """

    kind: Literal["evaluate"]
    model: Tested | None = None
    against: Tested | None = None
    prompts: list[Source] = Field(default_factory=list)
    reward: list[Judging] = Field(default_factory=list)
    judge: FunctionName | None = None
    rows: Positive = 256
    show: Positive = 3
    micro_batch: Positive = 32
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _whole_comparison(self) -> Evaluate:
        given = {"model": self.model, "against": self.against, "prompts": self.prompts or None}
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ValueError(f"a comparison needs `model`, `against` and `prompts`; {missing[0]} is missing")
        return self
