"""The block of a distillation stage, and what it asks of its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.block import Block, Dtype, Fraction
from pipeline.config.schema import Sampling, Source, Supervised
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


class Teacher(Block):
    """Who teaches: an earlier `stage` (or `base`), or the `model` of a hub id or a folder, which has the student's
    vocabulary. Keys that are not given are the student's `base`'s; a stage's weights are held as the student's are."""

    stage: str | None = None
    model: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    quantization: Literal["nf4"] | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Teacher:
        if (self.stage is None) == (self.model is None):
            raise ValueError("give the name of an earlier stage, or `model` for another teacher, and not both")
        if self.stage is not None and (self.revision or self.dtype or self.quantization):
            raise ValueError("revision, dtype and quantization are those of a `model`")
        return self


class Distill(Supervised):
    """A student learns the next-token distributions of a teacher (GKD: Agarwal et al. 2024, arXiv 2306.13649).

    `beta` says by which divergence: 0 the forward KL, 1 the reverse KL, between them the generalised Jensen-Shannon
    divergence, of both distributions at `temperature`. With probability `lmbda` a batch's replies are the student's own, drawn
    as `sampling` says, else those of the data; prompts need no reply in the data when `lmbda` is 1. A row has at most
    `max_length` tokens, a prompt that is replied to at most `sampling.max_prompt_length`.
    """

    kind: Literal["distill"]
    teacher: Annotated[Teacher, BeforeValidator(lambda v: {"stage": v} if isinstance(v, str) else v)]
    data: Annotated[list[Source], Field(min_length=1)]
    beta: Fraction = 0.5
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    lmbda: Fraction = 0.5
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _replies_do_not_depend_on_ranks(self) -> Distill:
        if self.sampling.engine == "deepspeed":
            raise ValueError("the engine deepspeed samples tokens that depend on the ranks; use static or hf")
        if self.sampling.adapter == "merged":
            raise ValueError("a student replies with its adapter as it trains; leave out sampling.adapter")
        return self

    def longest(self, row: int) -> int:
        """Tokens of the longest text that the student reads, when the data's longest has `row`."""
        replied = self.sampling.max_prompt_length + self.sampling.max_response_length if self.lmbda else 0
        return max(row, replied)


def check_distill(recipe: Recipe, stage: str, block: Distill) -> None:
    """Raise UserError for a student that starts as its teacher: it would have nothing to learn."""
    if block.teacher.stage == block.init:
        raise UserError(
            recipe.where("stages", stage, "teacher"),
            f"the student starts as its teacher, {block.init}",
            expected="two different models",
            fix="name another teacher, or start elsewhere with `init`",
        )
