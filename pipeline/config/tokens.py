"""Whether a recipe's chat templates and added tokens go together from stage to stage, and with what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.block import closest
from pipeline.config.methods import METHODS
from pipeline.data.templates import FILE, NAMED
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


def template_file(recipe: Recipe, stage: str) -> Path | None:
    """The file of the stage's chat template, where the recipe names one."""
    base = recipe.stages[stage].base
    name = base.chat_template if base else None
    return Path(recipe.local(name)) if name is not None and name not in NAMED else None


def check_tokens(recipe: Recipe, stage: str) -> None:
    """Raise UserError for a template that is not there, for one that is not the upstream stages', and for added tokens that
    the stage's method cannot train."""
    block = recipe.stages[stage]
    if not block.base:
        return
    where, name = recipe.where("stages", stage, "base", "chat_template"), block.base.chat_template
    file = template_file(recipe, stage)
    if file is not None and not (file.suffix == FILE and file.is_file()):
        raise UserError(
            where,
            f'no chat template "{name}"' + (f" in {recipe.path.parent}" if file.suffix == FILE else ""),
            expected=f"a {FILE} file or one of: " + ", ".join(NAMED),
            fix=closest(str(name), NAMED) or "leave it out: the tokenizer's own is taken, else plain",
        )
    for parent in recipe.parents(stage):
        above = recipe.stages[parent].base
        for key in ("chat_template", "add_tokens") if above else ():
            ours, theirs = getattr(block.base, key), getattr(above, key)
            if ours != theirs:
                raise UserError(
                    where.replace("chat_template", key),
                    f"{ours!r}, and its upstream stage {parent} has {theirs!r}",
                    expected="one tokenizer and one template through the chain",
                    fix=f"write `{key}` once, in `base` at the top of the recipe",
                )
    if block.base.add_tokens:
        check_rows(recipe, stage, block.base.add_tokens)


def check_rows(recipe: Recipe, stage: str, tokens: list[str]) -> None:
    """Raise UserError where a training stage's method does not train the embeddings of added tokens."""
    block = recipe.stages[stage]
    method = block.adapter.method
    if hasattr(block, "lr") and not METHODS[method].rows:
        raise UserError(
            recipe.where("stages", stage, "adapter", "method"),
            f"{method} with added tokens ({', '.join(tokens)}), whose embeddings it does not train",
            expected="one of: " + ", ".join(name for name, known in METHODS.items() if known.rows),
            fix="write `method: lora`, or leave out what adds tokens (base.add_tokens, base.chat_template)",
        )
