"""Score responses by a Python function named in the recipe: `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError

Judge = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]
"""(prompts, responses, rows) -> one score per response, higher is better; `rows` are the fields of the prompts' data rows."""

EXPECTED = "function(prompts, responses, rows) -> scores"


def load_function(name: str, where: str) -> Judge:
    """The function that `name` names. Raises UserError when it cannot be imported or does not take three arguments."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UserError(
            where,
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            expected="package.module:function",
            fix="check the spelling, that the module is on PYTHONPATH and that Python imports it",
        ) from error
    if not callable(function):
        raise UserError(where, f"{name} is not a function", expected=EXPECTED)
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        raise UserError(where, f"{name} does not take three arguments: {error}", expected=EXPECTED) from None
    except ValueError:
        pass  # some compiled functions have no signature to look at
    judge: Judge = function
    return judge
