r"""Checks that give 1.0 or 0.0: is the reply's final number the row's, does the reply have the form that was asked for.

A final number is found as GSM8K writes it (Cobbe et al. 2021, arXiv 2110.14168), after `####`, or as MATH does (Hendrycks
et al. 2021, arXiv 2103.03874), in `\boxed{}`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from pipeline.config.schema import VerifyReward
from pipeline.scoring.errors import SourceError
from pipeline.scoring.function import Judge

MARK = "####"

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus or plus right after a word, a bracket or a percent sign is an operator: the last number of "10-3" is 3.
_NUMBER = re.compile(rf"((?<![\w)\]}}%])[-+])?\$?({_UNSIGNED})(?:/({_UNSIGNED}))?")
_ALONE = re.compile(rf"{_NUMBER.pattern}(?:\s*%)?\.?")
# Not after a digit, where it is the fraction of a mixed number.
_FRACTION = re.compile(r"(?<!\d)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_UNIT = re.compile(r"\\(?:text|mathrm)\{[^{}]*\}")
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_SPELLINGS = (("\N{MINUS SIGN}", "-"), (r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\,", ""), (r"\!", ""))


def judge(block: VerifyReward, name: str) -> Judge:
    """`exact_answer` or `format` (see `VerifyReward`). Raises SourceError for a row without a number in `block.field`."""
    if block.pattern is not None:
        pattern = re.compile(block.pattern, re.DOTALL)
        return lambda prompts, responses, rows: [float(pattern.fullmatch(text) is not None) for text in responses]

    def exact_answer(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        scores = []
        for index, (prompt, response, row) in enumerate(zip(prompts, responses, rows, strict=True)):
            if row.get(block.field) is None:
                raise SourceError(name, index, f"its data row has no field `{block.field}`", prompt, response)
            expected = reference(row[block.field])
            if expected is None:
                reason = f"the field `{block.field}` holds no number: {repr(row[block.field])[-100:]}"
                raise SourceError(name, index, reason, prompt, response)
            scores.append(float(final_number(response) == expected))
        return scores

    return exact_answer


def reference(value: Any) -> Fraction | None:
    """The number after the last `####` of a field, or that the field as a whole is; None when there is none."""
    if isinstance(value, str):
        text = _plain(value)
        return _first(text.rpartition(MARK)[2]) if MARK in text else _whole(text)
    if isinstance(value, (int, float)):
        try:
            return Fraction(str(value))  # the decimal as written: Fraction(0.1) is the nearest binary number
        except ValueError:  # nan, inf, True
            return None
    return None


def final_number(reply: str) -> Fraction | None:
    r"""The reply's answer: the number after its last `####`; without one, what its last `\boxed{}` holds, which must be
    nothing but a number and its unit; without that too, the reply's last number. None when there is none.

    `$`, `%`, commas between thousands, a leading `+`, a closing full stop and closing decimal zeros do not matter. Values
    are exact: `1/4` is 0.25, `1/3` is not 0.333.
    """
    text = _plain(reply)
    if MARK in text:
        return _first(text.rpartition(MARK)[2])
    if r"\boxed{" in text:
        box = _BOX.match(text, text.rindex(r"\boxed{"))
        return _whole(box[1]) if box else None
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _plain(text: str) -> str:
    """LaTeX's ways to write a number, as plain text writes it."""
    for written, plain in _SPELLINGS:
        text = text.replace(written, plain)
    return _FRACTION.sub(r"\1/\2", _UNIT.sub("", text))


def _first(text: str) -> Fraction | None:
    found = _NUMBER.search(text)
    return _value(found) if found else None


def _whole(text: str) -> Fraction | None:
    found = _ALONE.fullmatch(text.strip())
    return _value(found) if found else None


def _value(found: re.Match[str]) -> Fraction | None:
    sign, top, bottom = found.groups()
    try:
        value = Fraction(top.replace(",", "")) / Fraction((bottom or "1").replace(",", ""))
    except (ValueError, ZeroDivisionError):  # Python reads no integer of more than 4300 digits
        return None
    return -value if sign == "-" else value
