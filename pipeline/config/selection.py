"""The block of a selection stage, and what it asks of the stages it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.block import Block, Dtype, Positive, misplaced
from pipeline.config.schema import Frozen, Sampling, Source
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


class Scorer(Block):
    """What scores a reply: the reward `stage` of the chain, or any Hugging Face sequence classifier with one label, the
    `model` of a hub id or a folder, which reads with its own tokenizer and chat template."""

    stage: str | None = None
    model: str | None = None
    revision: str | None = None
    dtype: Dtype = "bf16"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Scorer:
        if (self.stage is None) == (self.model is None):
            raise ValueError("give the name of a reward stage, or `model` for another reward model, and not both")
        return self

    @property
    def name(self) -> str:
        """What metrics call it: the stage, or the last part of the model's id or folder."""
        return self.stage or str(self.model).rstrip("/").rpartition("/")[2]


class Cut(Block):
    """Where a list of scores is cut: at `threshold`, or so that the share `keep` of them is kept."""

    threshold: float | None = None
    keep: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @model_validator(mode="after")
    def _one_cut(self) -> Cut:
        if (self.threshold is None) == (self.keep is None):
            raise ValueError("give `threshold` or `keep`, and not both")
        return self


class Quality(Cut):
    """Rows are good whose reply scores above `threshold`, or which are the `keep` share with the highest scores."""


class Necessity(Cut):
    """Good rows are necessary where the own reply of `model` scores below `threshold`, or is among the `keep` share with the
    lowest scores. `model` is a policy that was trained on an earlier selection, or `base`."""

    model: str


class Coverage(Block):
    """Rows are spread by k-center greedy over the means of their last hidden states in `embedding`: the base, or a policy."""

    embedding: str = "base"


class Selection(Frozen):
    """Chooses `budget` rows worth training on, by quality, necessity and coverage (MoDS: Du, Zong and Zhang 2023, arXiv
    2311.15653). The rows that the selection `include` chose are handed on too, and count.

    `sampling` says how the model of `necessity` replies; `micro_batch` rows are read at a time, and what was read is saved
    after every `save_every` such batches of a rank.
    """

    kind: Literal["selection"]
    data: Annotated[list[Source], Field(min_length=1)]
    budget: Positive
    reward: Annotated[Scorer, BeforeValidator(lambda v: {"stage": v} if isinstance(v, str) else v)] | None = None
    quality: Quality | None = None
    necessity: Necessity | None = None
    coverage: Coverage = Coverage()
    include: str | None = None
    max_length: Positive = 512
    micro_batch: Positive = 32
    save_every: Positive = 50
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _scores_have_a_use(self) -> Selection:
        if (self.reward is None) != (self.quality is None and self.necessity is None):
            raise ValueError(
                "quality and necessity are scores of a reward model: name it by `reward`"
                if self.reward is None
                else "nothing uses the scores of `reward`: give `quality`, `necessity` or both"
            )
        if any(source.weight is not None for source in self.data):
            raise misplaced("data", "a selection looks at every row once, found weight", [])
        if self.sampling.engine == "deepspeed":
            raise ValueError("the engine deepspeed samples tokens that depend on the ranks; use static or hf")
        return self


def check_selection(recipe: Recipe, stage: str, block: Selection) -> None:
    """Raise UserError where a selection cannot have its budget, or does not look at the rows of the one it includes."""

    def refuse(key: str, found: str, expected: str = "", fix: str = "") -> None:
        raise UserError(recipe.where("stages", stage, key), found, expected=expected, fix=fix)

    limits = [source.limit for source in block.data]
    most = sum(limit for limit in limits if limit is not None)
    if None not in limits and block.budget > most:
        refuse("budget", f"{block.budget} rows of at most {most}", f"at most {most}", "lower it, or raise the limit")
    if block.include is None:
        return
    other: Any = recipe.stages[block.include]
    if stage in recipe.header.data.split:
        place = recipe.where("data", "split", stage)
        fix = f"remove it: {block.include}'s part is looked at again"
        raise UserError(place, f"stage {stage} includes {block.include}, whose rows it chooses from", fix=fix)
    for key in ("data", "max_length"):
        if getattr(block, key) != getattr(other, key):
            refuse(
                key,
                f"stage {stage} includes {block.include} and does not look at the same rows",
                f"`{key}` as {block.include} has it",
                f"copy it from {block.include}",
            )
    if block.budget <= other.budget:
        refuse(
            "budget",
            f"{block.budget} rows, and {block.include} has chosen up to {other.budget} of them already",
            f"more than {other.budget}",
            "raise it",
        )
