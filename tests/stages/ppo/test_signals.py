"""Signals of trouble: each condition at its limit, patience, re-arming, and continuing from a saved state."""

from __future__ import annotations

import json
import math
import re
from typing import Any, get_args

import pytest

from pipeline.config.schema import Ppo, SignalName, Signals
from stages.ppo.signals import CONDITIONS, Raised, Watch

pytestmark = pytest.mark.fast

OFF: dict[str, Any] = dict.fromkeys(get_args(SignalName))

# condition, its metric, limit, first step's value, a value exactly at the limit, one just past it
LIMITS = [
    ("length_drift", "objective/length", 2.0, 100.0, 200.0, 200.5),
    ("length_drift", "objective/length", 2.0, 100.0, 50.0, 49.5),
    ("kl_budget", "objective/kl", 8.0, 0.0, 8.0, 8.01),
    ("entropy_collapse", "policy/entropy_avg", 0.25, 2.0, 0.5, 0.49),
    ("clip_fraction", "policy/clipfrac_avg", 0.5, 0.1, 0.5, 0.51),
    ("explained_variance", "val/explained_variance", 0.0, 0.3, 0.0, -0.01),
    ("identical_responses", "val/identical_responses", 0.5, 0.0, 0.5, 0.51),
    ("truncated_responses", "val/truncated_responses", 0.9, 0.4, 0.9, 0.91),
]


def watch(**settings: Any) -> Watch:
    """A Watch on which only the given conditions are on, without patience unless given."""
    patience = settings.get("patience", 1)
    return Watch(Signals(**{**OFF, "patience": patience, "evaluations": patience, **settings}))


def names(raised: list[Raised]) -> list[str]:
    return [signal.name for signal in raised]


def scores(score: float, gold: float, gold_std: float = 2.0) -> dict[str, float]:
    return {"eval/score": score, "eval/gold": gold, "eval/gold_std": gold_std}


def test_every_signal_of_the_recipe_is_watched() -> None:
    assert (
        {*CONDITIONS, "over_optimisation"}
        == set(get_args(SignalName))
        == {row[0] for row in LIMITS} | {"over_optimisation"}
    )


@pytest.mark.parametrize(("name", "metric", "limit", "first", "at", "past"), LIMITS)
def test_raised_past_its_limit_alone(
    name: str, metric: str, limit: float, first: float, at: float, past: float
) -> None:
    found = watch(**{name: limit})
    assert [names(found.step({metric: value})) for value in (first, at, past)] == [[], [], [name]]
    assert found.held == {name: 1}
    assert found.metrics() == {f"signals/{name}": 1.0}


@pytest.mark.parametrize(("name", "metric", "limit", "first", "at", "past"), LIMITS)
def test_off_absent_and_nan_are_not_measured(
    name: str, metric: str, limit: float, first: float, at: float, past: float
) -> None:
    off, on = watch(), watch(**{name: limit})
    for value in (first, past, past):
        assert off.step({metric: value}) == []
    for metrics in ({metric: math.nan}, {}, {metric: math.nan}):
        assert on.step(metrics) == []
    assert off.held == on.held == off.metrics() == on.metrics() == {}
    # The reference is the first value that is a number.
    assert [names(on.step({metric: value})) for value in (first, at, past)] == [[], [], [name]]


def test_patience_and_rearming() -> None:
    """Holds at steps 2-3 (too short), 5-8 (raised at 7, once) and 10-12 (raised again at 12)."""
    found = watch(patience=3, clip_fraction=0.5)
    fractions = [0.1, 0.6, 0.7, 0.5, 0.6, 0.7, 0.62, 0.9, 0.2, 0.8, 0.8, 0.8]
    raised, up = [], []
    for step, fraction in enumerate(fractions, start=1):
        raised += [(step, signal.message) for signal in found.step({"policy/clipfrac_avg": fraction})]
        up.append(found.metrics()["signals/clip_fraction"])
    advice = "lower lr, epochs or minibatches"
    assert raised == [
        (7, f"clip_fraction: 0.62 of the tokens were clipped (limit 0.5), for 3 steps, since step 5: {advice}"),
        (12, f"clip_fraction: 0.8 of the tokens were clipped (limit 0.5), for 3 steps, since step 10: {advice}"),
    ]
    assert up == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert found.held == {"clip_fraction": 2 + 4 + 3}


def test_nan_neither_continues_nor_ends_a_run() -> None:
    found = watch(patience=2, kl_budget=1.0)
    raised = [names(found.step({"objective/kl": kl})) for kl in (2.0, math.nan, 2.0, math.nan, 2.0, math.inf)]
    assert raised == [[], [], ["kl_budget"], [], [], []]
    assert found.held == {"kl_budget": 4}


def test_several_at_once_and_defaults() -> None:
    """The recipe's defaults on a collapsed policy: everything but the budget, which is off."""
    healthy = {
        "objective/length": 100.0,
        "objective/kl": 1e6,
        "policy/entropy_avg": 2.0,
        "policy/clipfrac_avg": 0.1,
        "val/explained_variance": 0.5,
        "val/identical_responses": 0.0,
        "val/truncated_responses": 0.2,
    }
    sick = {
        "objective/length": 256.0,
        "objective/kl": 1e6,
        "policy/entropy_avg": 0.1,
        "policy/clipfrac_avg": 0.9,
        "val/explained_variance": -3.0,
        "val/identical_responses": 1.0,
        "val/truncated_responses": 1.0,
    }
    found = Watch(Signals(patience=3))
    raised = [names(found.step(metrics)) for metrics in (healthy, sick, sick, sick, sick)]
    expected = {*get_args(SignalName)} - {"over_optimisation", "kl_budget"}
    assert [set(r) for r in raised] == [set(), set(), set(), expected, set()]
    assert found.held == dict.fromkeys(expected, 4)


@pytest.mark.parametrize(("gold", "expected"), [(9.0, []), (8.75, ["over_optimisation"])])
def test_over_optimisation_past_its_limit_alone(gold: float, expected: list[str]) -> None:
    """Half of a standard deviation of 2 below the best, 10."""
    found = watch(over_optimisation=0.5)
    assert found.evaluation(scores(1.0, 10.0)) == []
    assert names(found.evaluation(scores(1.5, gold))) == expected


@pytest.mark.parametrize("score", [1.0, 0.5])
def test_both_scores_falling_is_no_over_optimisation(score: float) -> None:
    found = watch(over_optimisation=0.5)
    assert found.evaluation(scores(1.0, 10.0)) == found.evaluation(scores(score, 2.0)) == []
    assert found.metrics() == {"signals/over_optimisation": 0.0}


def test_the_first_of_equally_good_evaluations_counts() -> None:
    """The score rose since gold was first 10, though not since it was 10 again."""
    found = watch(over_optimisation=0.5)
    assert found.evaluation(scores(1.0, 10.0)) == found.evaluation(scores(3.0, 10.0)) == []
    assert names(found.evaluation(scores(2.0, 8.0))) == ["over_optimisation"]


def test_over_optimisation_is_relative_to_the_best_gold_score() -> None:
    """Best at step 20: from there, gold falls by 3 > 0.5 x 4 twice, by 1 once, and by 3 again with the score below."""
    found = watch(patience=2, over_optimisation=0.5)
    series = [(1.0, 5.0, 9.0), (2.0, 10.0, 4.0), (3.0, 7.0, 9.0), (4.0, 7.0, 9.0), (5.0, 9.0, 9.0), (1.5, 7.0, 9.0)]
    raised = []
    for row in series:
        for _ in range(10):
            found.step({})
        raised += [(found.steps, signal.message) for signal in found.evaluation(scores(*row))]
    assert raised == [
        (
            40,
            "over_optimisation: gold fell from 10 at step 20 to 7 (limit 0.5 standard deviations of 4) while the score "
            "rose from 2 to 4, for 2 evaluations, since step 30: raise kl.coef, improve the reward or train for fewer "
            "steps",
        )
    ]
    assert found.held == {"over_optimisation": 2}
    assert found.metrics() == {"signals/over_optimisation": 0.0}


def test_over_optimisation_needs_numbers() -> None:
    found, off = watch(over_optimisation=0.0), watch()
    for metrics in ({"eval/score": 1.0}, scores(1.0, math.nan), scores(1.0, 99.0, math.nan), scores(math.nan, 99.0)):
        assert found.evaluation(metrics) == []
    assert found.held == {}
    # None of them was a best; without any spread, every fall counts.
    assert found.evaluation(scores(1.0, 10.0, 0.0)) == []
    assert names(found.evaluation(scores(2.0, 9.875, 0.0))) == ["over_optimisation"]
    assert off.evaluation(scores(1.0, 10.0)) == off.evaluation(scores(2.0, 0.0)) == []
    assert off.metrics() == {}


@pytest.mark.parametrize("cut", range(10))
def test_a_resumed_run_continues_exactly(cut: int) -> None:
    """Saved after any step, as the checkpoint does, and loaded into a fresh Watch: the same signals, counts and state."""
    lengths = [100.0, 210.0, 220.0, 230.0, 120.0, math.nan, 40.0, 40.0, 40.0, 40.0]
    golds = [5.0, 10.0, 8.0, 8.0, 10.0, 8.0, 8.0, 11.0, 10.0, 9.0]

    def go(found: Watch, first: int, last: int) -> list[Raised]:
        raised = []
        for i in range(first, last):
            raised += found.step({"objective/length": lengths[i], "policy/clipfrac_avg": 0.6 if i > 3 else 0.1})
            raised += found.evaluation(scores(float(i), golds[i]))
        return raised

    block = Signals(patience=2, evaluations=2, over_optimisation=0.5)
    whole, before, after = Watch(block), Watch(block), Watch(block)
    expected = go(whole, 0, 10)
    found = go(before, 0, cut)
    after.load(json.loads(json.dumps(before.state(), sort_keys=True, allow_nan=False)))
    assert after == before
    found += go(after, cut, 10)
    assert found == expected
    assert names(expected) == [
        "length_drift",  # step 3
        "over_optimisation",  # 4
        "clip_fraction",  # 6
        "over_optimisation",  # 7
        "length_drift",  # 8
    ]
    assert after == whole
    assert list(after.held.items()) == list(whole.held.items())
    assert after.metrics() == whole.metrics()


@pytest.mark.parametrize("name", CONDITIONS)
def test_advice_names_settings_that_exist(name: SignalName) -> None:
    """Every word with a dot or an underscore in it is a setting of the PPO block."""
    for setting in re.findall(r"\w+(?:\.\w+)+|\w+_\w+", CONDITIONS[name].advice):
        block: Any = Ppo
        for part in setting.split("."):
            assert part in block.model_fields, setting
            block = block.model_fields[part].annotation


def test_what_may_end_the_training_began_at() -> None:
    """Truncation holds from step 2 on, the clip fraction from step 3 on, and only the latter is stopped on at first."""
    found = watch(patience=5, truncated_responses=0.5, clip_fraction=0.5, stop_on=["clip_fraction"])
    for truncated, clipped in ((0.0, 0.0), (1.0, 0.0)):
        found.step({"val/truncated_responses": truncated, "policy/clipfrac_avg": clipped})
        assert found.suspect_since() is None
    found.step({"val/truncated_responses": 1.0, "policy/clipfrac_avg": 1.0})
    assert found.suspect_since() == 3
    both = Watch(Signals(patience=5, stop_on=["clip_fraction", "truncated_responses"]))
    both.load(found.state())
    assert both.suspect_since() == 2
    assert found.raised == {}


def test_only_what_was_raised_is_told_at_the_end() -> None:
    found = watch(patience=2, truncated_responses=0.5)
    for share in (1.0, 0.0, 1.0):
        found.step({"val/truncated_responses": share})
    assert (found.held, found.raised) == ({"truncated_responses": 2}, {})
    found.step({"val/truncated_responses": 1.0})
    assert found.raised == {"truncated_responses": 3}
