"""One interface to every reward source that reads text: a function, an endpoint, a check of the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.schema import FunctionReward, HttpReward, VerifyReward
from pipeline.errors import UserError
from pipeline.scoring import http, verify
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.function import Judge, load_function

__all__ = ["Source", "SourceError", "SourceUnavailable", "build", "checked"]

LARGEST = 3.4e38
"""Scores become float32, where anything larger is infinite."""


@dataclass(frozen=True)
class Source:
    """A judge with the name that metrics and errors call it by and its weight in the reward."""

    name: str
    weight: float
    judge: Judge

    def __call__(self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return self.judge(prompts, responses, rows)


def build(source: FunctionReward | HttpReward | VerifyReward, where: str) -> Source:
    """The source that a block of the recipe describes. Raises UserError at `where` when there is no such function or host."""
    if isinstance(source, FunctionReward):
        return Source(f"function:{source.function}", source.weight, load_function(source.function, where))
    if isinstance(source, HttpReward):
        name = f"http:{address(source.http, where)}"
        return Source(name, source.weight, http.judge(source, name, where))
    name = f"verify:{source.verify}"
    return Source(name, source.weight, verify.judge(source, name))


def checked(source: Source, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The source's scores as floats, one number per response, finite in float32. Raises SourceError for anything else.

    Whatever converts to a float without being text is a number: bool, numpy and torch scalars included.
    """
    try:
        answer: Any = source(prompts, responses, rows)
        values = list(answer) if isinstance(answer, Iterable) else None
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(source.name, None, f"raised {type(error).__name__}: {error}") from error
    if values is None:
        raise SourceError(source.name, None, f"returned {type(answer).__name__}, not a list of scores")
    if len(values) != len(responses):
        raise SourceError(source.name, None, f"returned {len(values)} scores for {len(responses)} responses")
    scores = [_number(value) for value in values]
    for row, score in enumerate(scores):
        if score is None or not abs(score) <= LARGEST:  # false for NaN too
            found = f"{repr(values[row])[:100]}, not a number" if score is None else f"{score:g}, not finite"
            raise SourceError(source.name, row, f"its score is {found}", prompts[row], responses[row])
    return [score for score in scores if score is not None]


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)) or getattr(value, "shape", ()) != ():
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:  # an integer above 1.8e308
        return float("inf")


def address(url: str, where: str) -> str:
    """`host:port/path` of an URL: its query may hold a key and stays out of names."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError as error:
        raise UserError(where, f"{url} is not an address: {error}", expected="http://host:port/path") from None
    if not parts.hostname or parts.username is not None:
        raise UserError(where, "the address has no host, or a user before it", expected="http://host:port/path")
    return f"{parts.hostname}{port}{parts.path}"
