"""What the records of two sides come to, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from stages.evaluate.comparison import compared, side_by_side, summary, verdicts

pytestmark = pytest.mark.fast


def record(reply: str, tokens: str, kl: float, *, ended: bool) -> dict[str, Any]:
    ids = [ord(token) for token in tokens]
    return {"prompt": "p", "reply": reply, "tokens": ids, "kl": kl, "length": len(ids) + ended, "ended": ended}


SIDES = {
    "model": [
        record("aaaaaa", "aaaaaa", 1.0, ended=False),
        record("I cannot help with that.", "abc", 2.0, ended=True),
        record(" ", "", 0.0, ended=True),
    ],
    "against": [record("ab", "ab", 0.0, ended=True)] * 3,
}


def test_summary() -> None:
    """Ours: one of three cut off, one empty, one refusal; two of the three 4-grams of aaaaaa repeat; 3 words of 9."""
    found = summary(SIDES)
    assert found["prompts"] == 3
    assert found["kl"] == 1.0
    ours = {name: found[f"{name}/model"] for name in ("length", "truncated", "empty", "refusals", "repetition")}
    assert ours == pytest.approx(
        {"length": 11 / 3, "truncated": 1 / 3, "empty": 1 / 3, "refusals": 1 / 3, "repetition": 2 / 9}
    )
    assert found["distinct_1/model"] == pytest.approx(3 / 9)
    assert found["distinct_2/model"] == pytest.approx(3 / 7)  # aa five times, ab, bc
    theirs = {name: found[f"{name}/against"] for name in ("length", "truncated", "distinct_1", "distinct_2")}
    assert theirs == pytest.approx({"length": 3.0, "truncated": 0.0, "distinct_1": 2 / 6, "distinct_2": 1 / 3})


def test_compared() -> None:
    found = compared("judge", [1.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 1.0], [0.0] * 4, 0)
    assert (found["judge/model"], found["judge/against"], found["judge/win_rate"]) == (1.5, 1.0, 2.5 / 4)
    assert found["judge/lc_win_rate"] == pytest.approx(2.5 / 4, abs=0.01)


def test_verdicts_of_a_chat_judge() -> None:
    """Won, lost, twice the first place, one order unreadable, a tie."""
    found = verdicts([("A", "B"), ("B", "A"), ("A", "A"), ("A", ""), ("C", "C")], [0.0] * 5, 0)
    assert found["chat_judge/win_rate"] == (1 + 0 + 0.5 * 3) / 5
    assert found["chat_judge/inconsistent"] == 1 / 5
    assert found["chat_judge/unreadable"] == 1 / 10


def test_side_by_side() -> None:
    judged = {
        "judge": {"model": [1.0, 2.0, 3.0], "against": [0.0, 0.5, 1.0]},
        "score/r": {"model": [4.0] * 3, "against": [5.0] * 3},
    }
    assert side_by_side(SIDES, judged)[1] == {
        "prompt": "p",
        "before": "ab",
        "after": "I cannot help with that.",
        "scores_before": {"judge": 0.5, "r": 5.0},
        "scores_after": {"judge": 2.0, "r": 4.0},
    }
