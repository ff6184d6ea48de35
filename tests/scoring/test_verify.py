"""The checks of an answer: numbers by hand, and every reference answer of GSM8K's test set."""

import gzip
import json
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import VerifyReward
from pipeline.scoring.errors import SourceError
from pipeline.scoring.source import build, checked
from pipeline.scoring.verify import final_number, reference

pytestmark = pytest.mark.fast

EXACT = build(VerifyReward(verify="exact_answer"), "here")


@pytest.fixture(scope="module")
def gsm8k(test_data: Path) -> list[dict[str, Any]]:
    with gzip.open(test_data / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        # After ####: the last one, the first number behind it, whatever else the reply holds.
        ("2+2=4\n#### 4", 4),
        ("#### 3\nNo, wait.\n#### 4\nThat took 2 steps.", 4),
        (r"\boxed{5} #### 4", 4),
        ("#### -10", -10),
        ("####4 apples", 4),
        ("So it is 4 ####", None),
        # In the last box, which holds nothing else.
        (r"\boxed{3}, no, \boxed{4}, in 2 steps", 4),
        (r"The cost is $\boxed{\$1{,}250.50}$ for 2", Fraction(2501, 2)),
        (r"\boxed{10,\!000} or 3", 10000),
        (r"\boxed{40\%}", 40),
        (r"\boxed{18 \text{ dollars}}", 18),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{\dfrac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{2\frac{1}{2}}", None),
        (r"\boxed{3 or 4}", None),
        (r"It is 4: \boxed{x^{2}}", None),
        (r"It is 4: \boxed{4", None),
        # Else the last number.
        ("16 - 3 = 13. She sells 13 eggs.", 13),
        ("It costs $18.", 18),
        ("It costs $1,234,567.", 1234567),
        ("12345,678", 678),
        ("options 2, 3", 3),
        ("options 1,2345", 2345),
        ("+7", 7),
        ("7.0", 7),
        ("007.50", Fraction(15, 2)),
        (".5", Fraction(1, 2)),
        ("50%.", 50),
        ("a loss of -$5", -5),
        ("a loss of $-5", -5),
        ("a loss of \N{MINUS SIGN}5", -5),
        ("10-3", 3),
        ("(4)-3", 3),
        ("**18**", 18),
        ("3/4 of it", Fraction(3, 4)),
        ("-1,500/2", -750),
        ("5/0", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number_by_hand(reply: str, number: Fraction | int | None) -> None:
    assert final_number(reply) == number


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("so 2+2=<<2+2=4>>4\n#### 4", 4),
        ("so\n#### 1,450,000", 1450000),
        ("#### 3 at first\n#### 4", 4),
        (" $18.00 ", 18),
        ("+50 %.", 50),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (18, 18),
        (0.1, Fraction(1, 10)),
        (1e-07, Fraction(1, 10**7)),
        ("18 or 19", None),
        ("the answer is 18", None),
        ("####", None),
        ("1/0", None),
        (float("nan"), None),
        (True, None),
        ([18], None),
    ],
    ids=repr,
)
def test_reference_by_hand(field: Any, number: Fraction | int | None) -> None:
    assert reference(field) == number


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("#### 1/4", "0.25", 1.0),
        ("#### 0.25", "#### 1/4", 1.0),
        ("#### 0.333", "1/3", 0.0),
        ("#### 2/6", "1/3", 1.0),
        # Equal as floats: 2^53 and the next integer, and 17 decimals of a tenth.
        ("#### 9007199254740993", "9007199254740992", 0.0),
        ("#### 0.10000000000000001", "0.1", 0.0),
        ("#### 18.000", "$18", 1.0),
        ("#### -18", "18", 0.0),
        ("I do not know.", "18", 0.0),
    ],
)
def test_exact_answer_by_hand(reply: str, answer: str, score: float) -> None:
    assert checked(EXACT, ["p"], [reply], [{"answer": answer}]) == [score]


def test_replies_that_ran_away_score_nothing_and_take_no_time() -> None:
    runaways = ["9" * 100_000, "1," * 50_000, "1,111" * 20_000, r"\boxed{1" + " " * 100_000 + "x}", "1/" * 50_000]
    runaways += [r"\frac{" * 20_000, "-$" * 50_000, "####" * 20_000]
    started = time.process_time()
    assert checked(EXACT, ["p"] * len(runaways), runaways, [{"answer": "18"}] * len(runaways)) == [0.0] * len(runaways)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"solution": "18"}, "its data row has no field `answer`"),
        ({"answer": None}, "its data row has no field `answer`"),
        ({"answer": "eighteen"}, "the field `answer` holds no number: 'eighteen'"),
    ],
)
def test_a_row_without_an_answer_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SourceError) as caught:
        checked(EXACT, ["p", "q"], ["#### 1", "#### 18"], [{"answer": "1"}, row])
    error = caught.value
    assert (error.source, error.row, error.reason) == ("verify:exact_answer", 1, reason)
    assert (error.prompt, error.response) == ("q", "#### 18")


def test_another_field() -> None:
    source = build(VerifyReward(verify="exact_answer", field="target"), "here")
    assert checked(source, ["p"], ["It is 4."], [{"answer": "5", "target": "4"}]) == [1.0]


def test_format_matches_the_whole_reply_over_lines() -> None:
    source = build(VerifyReward(verify="format", pattern="<think>.*</think>.+"), "here")
    replies = ["<think>a\nb</think>4", "<think>a</think>", " <think>a</think>4", "4", "<think></think>4\n5"]
    assert checked(source, ["p"] * 5, replies, [{}] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]
    short = build(VerifyReward(verify="format", pattern="a|ab"), "here")
    assert checked(short, ["p"] * 3, ["ab", "aba", "b"], [{}] * 3) == [1.0, 0.0, 0.0]


def test_gsm8k_answers_are_right_in_every_wording(gsm8k: list[dict[str, Any]]) -> None:
    finals = [row["answer"].rpartition("#### ")[2] for row in gsm8k]
    wordings = {
        "as written": [row["answer"] for row in gsm8k],
        "boxed": [rf"So 2 of them: $\boxed{{{final.replace(',', '{,}')}}}$, in 7 days." for final in finals],
        "in words": [f"After 3 days it makes {final}.00 dollars." for final in finals],
    }
    assert len(gsm8k) == 1319
    for replies in wordings.values():
        assert checked(EXACT, [row["question"] for row in gsm8k], replies, gsm8k) == [1.0] * len(gsm8k)


def test_gsm8k_answers_one_off_are_wrong(gsm8k: list[dict[str, Any]]) -> None:
    finals = [int(row["answer"].rpartition("#### ")[2].replace(",", "")) for row in gsm8k]
    replies = [
        re.sub(r"#### .*", f"#### {final + 1:,}", row["answer"]) for row, final in zip(gsm8k, finals, strict=True)
    ]
    assert checked(EXACT, [row["question"] for row in gsm8k], replies, gsm8k) == [0.0] * len(gsm8k)
    # The reply's final number and not some number in it.
    last = [f"{final}, no, {final + 1}" for final in finals]
    assert checked(EXACT, [row["question"] for row in gsm8k], last, gsm8k) == [0.0] * len(gsm8k)
