"""Score replies by a Python function named in the recipe: `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from pipeline.errors import UserError

Judge = Callable[[list[str], list[str]], list[float]]
"""(prompts, replies) -> one score per reply; higher is better."""


def load_function(name: str, where: str) -> Judge:
    """The function that `name` names. Raises UserError when it cannot be imported or called."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            where,
            f"{name} cannot be imported: {error}",
            expected="package.module:function",
            fix="check the spelling, and that the module is on PYTHONPATH",
        ) from None
    if not callable(function):
        raise UserError(where, f"{name} is not a function", expected="(prompts, replies) -> scores")
    judge: Judge = function
    return judge
