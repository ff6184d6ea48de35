"""The block of a merge stage, and what it asks of the adapters it combines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.block import Block, misplaced
from pipeline.config.methods import METHODS
from pipeline.config.schema import Adapter, Frozen
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

Combination = Literal["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations that keep a share of each adapter's numbers."""


class Part(Block):
    """An adapter to combine: that of a `stage`, of this recipe or, with `run`, of the run in that folder."""

    stage: str
    run: str | None = None

    @property
    def name(self) -> str:
        """What lineage and metrics call it."""
        return self.stage if self.run is None else f"{self.run.rstrip('/')}/{self.stage}"


class Merge(Frozen):
    """One adapter out of those of several stages, of this run or of others, as PEFT's `add_weighted_adapter` combines them; the
    stages stand on one base.

    `weights`, one for each stage, are 1 unless given. `linear` adds the factors A and B, each times the root of weight and
    scale, so that products of one adapter's A with another's B come with it; `cat` puts them side by side, which is the sum of
    the adapters' changes exactly, at the sum of their ranks. `ties` (Yadav et al. 2023, arXiv 2306.01708) keeps of each factor
    the share `density` with the largest magnitude, and of those the ones of the majority's sign; `dare_linear` and `dare_ties`
    (Yu et al. 2023, arXiv 2311.03099) keep a random share, drawn by `seed`, over `density`; `magnitude_prune` keeps the largest
    and adds them. The stage's `adapter` is that of the stages, with `cat` of the ranks' sum.
    """

    kind: Literal["merge"]
    of: Annotated[
        list[Annotated[Part, BeforeValidator(lambda v: {"stage": v} if isinstance(v, str) else v)]],
        Field(min_length=2),
    ]
    combination: Combination = "linear"
    weights: list[float] | None = None
    density: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Merge:
        if len({part.name for part in self.of}) < len(self.of):
            raise misplaced("of", "a stage twice", [])
        if self.weights is not None and len(self.weights) != len(self.of):
            raise misplaced("weights", f"{len(self.weights)} weights for {len(self.of)} stages", [])
        if (self.combination in SPARSE) != (self.density is not None):
            raise ValueError(
                f"{self.combination} keeps a share of each adapter: give `density`, such as 0.5"
                if self.combination in SPARSE
                else f"{self.combination} keeps everything: leave out `density`, or write `combination: ties`"
            )
        return self


def check_merge(recipe: Recipe, stage: str, block: Any) -> None:
    """Raise UserError where a stage's adapter cannot be combined, or is not of the shape of the others."""
    adapters = [_adapter(recipe, stage, part) for part in block.of]
    for part, theirs in zip(block.of, adapters, strict=True):
        name = part.name
        where, method = recipe.where("stages", stage, "of"), METHODS[theirs.method]
        if not method.combines:
            able = ", ".join(other for other, record in METHODS.items() if record.combines)
            raise UserError(
                where,
                f"stage {name}, which trains {theirs.method}: there is no weighted sum of such adapters",
                expected=f"one of: {able}",
                fix=f"write `adapter: {{method: {method.instead}}}` in stage {name}",
            )
        ours = block.adapter
        if block.combination == "cat":
            ours = ours.model_copy(update={"r": theirs.r, "alpha": theirs.alpha})
        if not ours.continues(theirs) or (block.combination == "cat" and theirs.rank_pattern):
            raise UserError(
                where,
                f"stage {name} trains another adapter than {stage} is to hand on",
                expected="one method, rank, scale and list of targets"
                + (", and no rank_pattern" if block.combination == "cat" else ""),
                fix=f"copy the `adapter` of {name} to {stage}, and train the other stages with it too",
            )
    total = sum(theirs.r for theirs in adapters)
    if block.combination == "cat" and block.adapter.r != total:
        raise UserError(
            recipe.where("stages", stage, "adapter", "r"),
            f"rank {block.adapter.r}, and cat puts {total} side by side",
            fix=f"write `adapter: {{r: {total}}}` in stage {stage}",
        )


def _adapter(recipe: Recipe, stage: str, part: Part) -> Adapter:
    """The adapter that a part trained. Raises UserError for a stage of another run that is not published, or no policy."""
    if part.run is None:
        return recipe.stages[part.stage].adapter
    from pipeline import handoff
    from pipeline.config.kinds import POLICIES

    baton, where = handoff.elsewhere(recipe, part.run, part.stage), recipe.where("stages", stage, "of")
    if baton is None:
        raise UserError(
            where,
            f"{recipe.local(part.run)} has no published stage {part.stage}",
            expected="the folder of a run, and a stage that it has finished",
            fix="finish that run first, or correct `run` and `stage`",
        )
    if baton.manifest["kind"] not in POLICIES:
        raise UserError(
            where, f"{part.name} is of kind {baton.manifest['kind']}", expected="one of: " + ", ".join(sorted(POLICIES))
        )
    return baton.adapter
