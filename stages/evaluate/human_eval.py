"""Problems solved by writing a function, and how often that succeeds (HumanEval: Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import engine
from stages.evaluate import sandbox
from stages.evaluate.files import texts

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What begins after a function ends: section 3.1 of the paper."""

FIELDS = ("prompt", "test", "entry_point")


@dataclass(frozen=True)
class Problem:
    """`prompt` is a function's head and docstring; `test` defines `check`, which is given the function `entry_point`."""

    prompt: str
    test: str
    entry_point: str

    def program(self, reply: str) -> str:
        """The function as the reply completes it, and its tests."""
        return f"{self.prompt}{completion(reply)}\n{self.test}\ncheck({self.entry_point})\n"


def problems(path: str, where: str) -> list[Problem]:
    """The problems of a data file. Raises UserError for a row that is none."""
    return [Problem(**row) for row in texts(path, FIELDS, where)]


def completion(reply: str) -> str:
    """The part of a reply that belongs to the function."""
    return reply[: min((place for stop in STOPS if (place := reply.find(stop)) >= 0), default=len(reply))]


def passed(problems: Sequence[Problem], replies: Sequence[str], seconds: float) -> list[int]:
    """How many of each problem's replies pass its tests; `replies` holds equally many for each problem, in turn. Collective:
    the first rank runs them. Raises UserError where this machine has no sandbox."""
    samples = len(replies) // len(problems)
    programs = [problems[place // samples].program(reply) for place, reply in enumerate(replies)]

    def run() -> list[bool]:
        outcomes = sandbox.run_all(programs, sandbox.Limits(seconds=seconds))
        return [outcome.status == "passed" for outcome in outcomes]

    right = engine.on_main(run)
    return [sum(right[start : start + samples]) for start in range(0, len(right), samples)]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that of `k` samples at least one is right, without bias from `samples`, of which `right` are: 1 - C(n-c, k)
    / C(n, k), equation 1 of the paper. Raises ValueError for a `k` above `samples`."""
    if k > samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
