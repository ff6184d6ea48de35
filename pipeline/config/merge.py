"""The block of a merge stage, and what it asks of the adapters it combines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.block import misplaced
from pipeline.config.methods import METHODS
from pipeline.config.schema import Frozen
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

Combination = Literal["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations that keep a share of each adapter's numbers."""


class Merge(Frozen):
    """One adapter out of those of several stages, as PEFT's `add_weighted_adapter` combines them; the stages stand on one base.

    `weights`, one for each stage, are 1 unless given. `linear` adds the factors A and B, each times the root of weight and
    scale, so that products of one adapter's A with another's B come with it; `cat` puts them side by side, which is the sum of
    the adapters' changes exactly, at the sum of their ranks. `ties` (Yadav et al. 2023, arXiv 2306.01708) keeps of each factor
    the share `density` with the largest magnitude, and of those the ones of the majority's sign; `dare_linear` and `dare_ties`
    (Yu et al. 2023, arXiv 2311.03099) keep a random share, drawn by `seed`, over `density`; `magnitude_prune` keeps the largest
    and adds them. The stage's `adapter` is that of the stages, with `cat` of the ranks' sum.
    """

    kind: Literal["merge"]
    of: Annotated[list[str], Field(min_length=2)]
    combination: Combination = "linear"
    weights: list[float] | None = None
    density: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Merge:
        if len(set(self.of)) < len(self.of):
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
    for name in block.of:
        theirs = recipe.stages[name].adapter
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
    total = sum(recipe.stages[name].adapter.r for name in block.of)
    if block.combination == "cat" and block.adapter.r != total:
        raise UserError(
            recipe.where("stages", stage, "adapter", "r"),
            f"rank {block.adapter.r}, and cat puts {total} side by side",
            fix=f"write `adapter: {{r: {total}}}` in stage {stage}",
        )
