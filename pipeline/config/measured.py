"""Data that a stage only measures itself on: no stage of the recipe may learn from it, and there must be some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.evaluate import Evaluate
from pipeline.config.kinds import KINDS
from pipeline.config.mixture import listed
from pipeline.config.schema import Source
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


def check_measured(recipe: Recipe, stage: str) -> None:
    """Raise UserError where some stage learns from what `stage` measures itself on."""
    block = recipe.stages[stage]
    for key in KINDS[block.kind].measured:
        wanted = {_place(source) for source in listed(block, key)[0]}
        for name, other in recipe.stages.items():
            learned = set(KINDS[other.kind].sources) - set(KINDS[other.kind].measured)
            for place in sorted(learned) if not isinstance(other, Evaluate) else ():
                for source in listed(other, place)[0]:
                    if _place(source) in wanted:
                        raise UserError(
                            recipe.where("stages", stage, key),
                            f"{source.name}, which stage {name} reads under `{place}`",
                            expected="a text that no stage of the recipe learns from",
                            fix="name another file, or another split",
                        )


def check_held_out(recipe: Recipe, stage: str) -> None:
    """Raise UserError where an evaluate stage tests on held-out rows and none are held out."""
    block = recipe.stages[stage]
    if not isinstance(block, Evaluate) or block.holdout > 0:
        return
    for key in KINDS[block.kind].sources:
        if key not in KINDS[block.kind].measured and listed(block, key)[0]:
            raise UserError(
                recipe.where("stages", stage, key),
                "nothing is held out to test on: data.holdout is 0",
                fix="set `data: {holdout: 0.02}`",
            )


def _place(source: Source) -> tuple[str, str | None, str, str | None]:
    """What makes two sources the same text."""
    return source.name, source.revision, source.split, source.subset
