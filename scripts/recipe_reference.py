"""Write docs/recipe.md, the reference of a recipe's keys, from the schema itself.

python scripts/recipe_reference.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from pipeline.config import schema
from pipeline.config.kinds import KINDS
from pipeline.config.recipe import INHERITED
from pipeline.config.schema import Block
from stages.ppo.advantage import ESTIMATORS

OUT = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
HEAD = """# The recipe

One YAML file is the whole experiment. This page is written by `python scripts/recipe_reference.py` from the schema.
Unknown keys and wrong types are refused with the key and a fix. Any stage may give its own `base`, `adapter`, `deepspeed`
and `seed`; keys it leaves out are the recipe's. Paths are relative to the recipe file, and `$NAME` is expanded.
"""


def table(block: type[Block], skip: tuple[str, ...] = ()) -> str:
    lines = ["| key | type | default |", "|---|---|---|"]
    for name, field in block.model_fields.items():
        if name in skip:
            continue
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, Block):
            shown = f"see {type(default).__name__}"
        else:
            shown = f"`{default}`"
        lines.append(f"| `{name}` | {kind(field.annotation)} | {shown} |")
    return "\n".join(lines)


def kind(annotation: Any) -> str:
    """A type as a reader writes it."""
    if "RewardSource" in str(annotation) or "StageReward" in str(annotation):
        return "a reward stage's name, or a list of sources: StageReward, FunctionReward, HttpReward, VerifyReward"
    text = (
        annotation.__name__
        if inspect.isclass(annotation) and not getattr(annotation, "__args__", ())
        else str(annotation)
    )
    for old, new in (("typing.", ""), ("pipeline.config.schema.", ""), ("NoneType", "none"), ("Literal", "one of ")):
        text = text.replace(old, new)
    text = re.sub(r", (After|Before)Validator\(.*", "", text)
    text = text.split("Annotated[")[-1].split(", FieldInfo")[0] if "Annotated[" in text else text
    return "`" + text.replace("|", "or") + "`"


def section(title: str, block: type[Block], skip: tuple[str, ...] = ()) -> str:
    return f"## {title}\n\n{inspect.cleandoc(block.__doc__ or '')}\n\n{table(block, skip)}\n"


def estimators() -> str:
    """The advantage estimators as their declarations say."""
    lines = [
        "## Advantage estimators",
        "",
        "What `advantage_estimator` may be, what each needs, and what it does unless `kl.place`, `loss_aggregation` or",
        "`whiten` say otherwise. The functions and their papers are in `stages/ppo/advantage.py`, where one is added.",
        "",
        "| name | critic | samples per prompt | greedy response too | KL penalty in the | mean over | whitened |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, e in ESTIMATORS.items():
        words = ["yes" if flag else "no" for flag in (e.critic, e.greedy, e.whiten)]
        lines.append(
            f"| `{name}` | {words[0]} | at least {e.samples} | {words[1]} | {e.kl} | {e.aggregation}s | {words[2]} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    parts = [HEAD, section("Top level", schema.Header)]
    for name in ("Base", "Adapter", "DeepSpeed", "DataRules", "Tracking", "Wandb", "Source"):
        parts.append(section(name, getattr(schema, name)))
    for name, stage in KINDS.items():
        parts.append(section(f"kind: {name}", stage.schema, (*INHERITED, "kind", "seed", "holdout")))
    sources = ("StageReward", "FunctionReward", "HttpReward", "VerifyReward")
    for name in ("Sampling", "Critic", "Kl", *sources, "Overlong", "Ptx", "Signals"):
        parts.append(section(name, getattr(schema, name)))
    parts.append(estimators())
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
