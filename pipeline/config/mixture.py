"""Whether the sources that a stage lists can be mixed as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config.kinds import KINDS
from pipeline.config.schema import Mix, Source, Stage
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


def listed(block: Stage, key: str) -> tuple[list[Source], Mix | None, bool]:
    """(the sources under `key`, dotted; the mixture's temperature beside them; whether they can be mixed at all)."""
    *path, last = key.split(".")
    owner: Any = block
    for part in path:
        owner = getattr(owner, part, None)
    return getattr(owner, last, None) or [], getattr(owner, "mix", None), hasattr(owner, "mix")


def check_mixture(recipe: Recipe, stage: str) -> None:
    """Raise UserError for weights on some sources and not on others, beside a temperature, or where nothing is trained."""
    block = recipe.stages[stage]
    for key in KINDS[block.kind].sources:
        found, mix, can = listed(block, key)
        weighted = [source for source in found if source.weight is not None]
        where = recipe.where("stages", stage, key)
        if weighted and not can:
            raise UserError(
                where, f"a weight for {weighted[0].name}, and {block.kind} uses each row once", fix="remove `weight`"
            )
        if weighted and mix is not None:
            raise UserError(
                where,
                "weights, and a temperature in `mix`",
                expected="one of the two",
                fix="remove `mix`, or the sources' `weight`",
            )
        if weighted and len(weighted) < len(found):
            without = next(source for source in found if source.weight is None)
            raise UserError(
                where,
                f"a weight for {weighted[0].name} and none for {without.name}",
                expected="a `weight` for every source, or for none",
            )
