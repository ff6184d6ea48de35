"""`--task`, `--method` and `--data` of the command line, as the overrides they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import plain_yaml
from pipeline.config.recipe import find, parse
from pipeline.errors import UserError


def shortcuts(recipe: str, task: str | None, method: str | None, data: Path | None) -> list[str]:
    """Overrides that give every classify stage of `recipe` its task and data, and its adapter a method.

    A run with another task or method is another run: both become part of its name, and so of its folder. Raises UserError
    where an option would change nothing.
    """
    if task is None and method is None and data is None:
        return []
    raw = parse(find(recipe))
    written = raw.get("stages")
    stages: dict[str, Any] = written if isinstance(written, dict) else {}
    keys = {"task": task, "data": None if data is None else str(data.resolve())}
    given = [
        f"stages.{stage}.{key}={_quoted(value)}"
        for key, value in keys.items()
        if value is not None
        for stage in _classifiers(recipe, stages, f"--{key} {value}")
    ]
    if method is not None:
        _check_method(recipe, stages, method)
        given.append(f"adapter.method={_quoted(method)}")
    name = "-".join(str(part) for part in (raw.get("name"), task, method) if part is not None)
    return [f"name={_quoted(name)}", *given]


def _classifiers(recipe: str, stages: dict[str, Any], option: str) -> list[str]:
    """The stages of kind classify. Raises UserError when there is none."""
    found = [stage for stage, block in stages.items() if isinstance(block, dict) and block.get("kind") == "classify"]
    if not found:
        raise UserError(
            option,
            f"recipe {recipe} has no stage of kind classify",
            expected="a recipe that fine-tunes a classifier, such as glue",
            fix=f"relay run glue {option}, or leave it out",
        )
    return found


def _check_method(recipe: str, stages: dict[str, Any], method: str) -> None:
    """Refuse a method where a stage names its own, which would go before it."""
    for stage, block in stages.items():
        own = block.get("adapter") if isinstance(block, dict) else None
        if isinstance(own, dict) and "method" in own:
            raise UserError(
                f"--method {method}",
                f"stage {stage} of recipe {recipe} has a method of its own: {own['method']}",
                expected="a recipe whose stages share its method",
                fix=f"--set stages.{stage}.adapter.method={method}",
            )


def _quoted(value: str) -> str:
    """`value` so that YAML reads back the same text: as it is where it does, else quoted."""
    try:
        plain = plain_yaml.read(value) == value
    except yaml.YAMLError:
        plain = False
    return value if plain else json.dumps(value)
