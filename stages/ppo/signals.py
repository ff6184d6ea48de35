"""Signals of trouble: which conditions hold on a step's metrics, for how long, and what to do about them.

The limits, and what each condition means, are `Signals` in the recipe; here is how each is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from pipeline.config.schema import SignalName, Signals


@dataclass(frozen=True)
class Condition:
    """Something one metric of a step shows. `holds(value, limit, first)` and the text `found` see the metric's value now,
    the recipe's limit and, where the condition is `relative`, the value at the first step."""

    metric: str
    holds: Callable[[float, float, float], bool]
    found: str
    advice: str
    relative: bool = False


def _above(value: float, limit: float, _: float) -> bool:
    return value > limit


def _below(value: float, limit: float, _: float) -> bool:
    return value < limit


CONDITIONS: dict[SignalName, Condition] = {
    "length_drift": Condition(
        "objective/length",
        lambda value, limit, first: value > first * limit or value * limit < first,
        "responses have {value:.4g} tokens, {first:.4g} in the first step (limit {limit:g} times more or less)",
        "read the samples, the reward may pay for length; raise kl.coef",
        relative=True,
    ),
    "kl_budget": Condition(
        "objective/kl",
        _above,
        "the policy is {value:.4g} nats per response from its start (limit {limit:g})",
        "raise kl.coef, set kl.target or lower lr",
    ),
    "entropy_collapse": Condition(
        "policy/entropy_avg",
        lambda value, limit, first: value < first * limit,
        "policy entropy is {value:.4g}, {first:.4g} in the first step (limit {limit:g} of it)",
        "raise entropy_coef or kl.coef, or lower lr",
        relative=True,
    ),
    "clip_fraction": Condition(
        "policy/clipfrac_avg",
        _above,
        "{value:.4g} of the tokens were clipped (limit {limit:g})",
        "lower lr, epochs or minibatches",
    ),
    "explained_variance": Condition(
        "val/explained_variance",
        _below,
        "the critic explains {value:.4g} of the variance of the returns (at least {limit:g} expected)",
        "raise critic.lr, or let the critic learn first with freezing_actor_steps",
    ),
    "identical_responses": Condition(
        "val/identical_responses",
        _above,
        "{value:.4g} of the responses have a copy in their batch (limit {limit:g})",
        "raise sampling.temperature, entropy_coef or kl.coef",
    ),
    "truncated_responses": Condition(
        "val/truncated_responses",
        _above,
        "{value:.4g} of the responses were cut off before EOS (limit {limit:g})",
        "raise sampling.max_response_length, or set missing_eos_penalty or overlong",
    ),
}
"""What a training step shows; evaluations show `over_optimisation`, which compares two scores (`Watch.evaluation`)."""


@dataclass(frozen=True)
class Raised:
    """A signal, and one line that says what was measured, the limit, since when, and what to do."""

    name: SignalName
    message: str


@dataclass
class Record:
    """How often a condition held, in all and in the present run, which began at step `since`; how often it was raised."""

    held: int = 0
    running: int = 0
    since: int = 0
    raised: int = 0


@dataclass(frozen=True)
class Best:
    """The evaluation with the best gold score so far, the first of equals."""

    step: int
    gold: float
    gold_std: float
    score: float


@dataclass
class Watch:
    """Follows the conditions through a training. A condition is up while it has held `patience` steps (`evaluations`
    evaluations) running.

    A value that is absent or NaN was not measured: it neither continues nor ends a run, nor serves as a reference.
    """

    block: Signals
    steps: int = 0
    first: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    records: dict[str, Record] = field(default_factory=dict)

    def step(self, metrics: dict[str, float]) -> list[Raised]:
        """The signals that the metrics of one more training step raise."""
        self.steps += 1
        raised = []
        for name, condition in CONDITIONS.items():
            limit, value = getattr(self.block, name), metrics.get(condition.metric, math.nan)
            if limit is None or math.isnan(value):
                continue
            first = self.first.setdefault(name, value) if condition.relative else math.nan
            found = condition.found.format(value=value, limit=limit, first=first)
            raised += self._note(name, condition.holds(value, limit, first), "step", found, condition.advice)
        return raised

    def evaluation(self, metrics: dict[str, float]) -> list[Raised]:
        """The signals that an evaluation after the present step raises.

        The yardstick is the standard deviation at the best evaluation: a policy that collapses on a few replies changes
        the spread of its own scores too.
        """
        limit = self.block.over_optimisation
        score, gold, gold_std = (metrics.get(f"eval/{name}", math.nan) for name in ("score", "gold", "gold_std"))
        if limit is None or not all(map(math.isfinite, (score, gold, gold_std))):
            return []
        if self.best is None or gold > self.best.gold:
            self.best = Best(self.steps, gold, gold_std, score)
        best = self.best
        holds = best.gold - gold > limit * best.gold_std and score > best.score
        found = (
            f"gold fell from {best.gold:.4g} at step {best.step} to {gold:.4g} (limit {limit:g} standard deviations of "
            f"{best.gold_std:.4g}) while the score rose from {best.score:.4g} to {score:.4g}"
        )
        advice = "raise kl.coef, improve the reward or train for fewer steps"
        return self._note("over_optimisation", holds, "evaluation", found, advice)

    @property
    def held(self) -> dict[str, int]:
        """At how many steps (evaluations) each condition held, of those that are on and were measured, in recipe order."""
        return {name: self.records[name].held for name in get_args(SignalName) if name in self.records}

    @property
    def raised(self) -> dict[str, int]:
        """`held` of the conditions that were raised at least once."""
        return {name: held for name, held in self.held.items() if self.records[name].raised}

    def suspect_since(self) -> int | None:
        """The first step of the longest run that may yet end the training: of a condition in `stop_on` that holds now."""
        running = [self.records[name] for name in self.block.stop_on if name in self.records]
        return min((record.since for record in running if record.running), default=None)

    def metrics(self) -> dict[str, float]:
        """`signals/<name>`: 1.0 while the condition is up, of those that are on and were measured."""
        return {f"signals/{name}": float(r.running >= self._patience(name)) for name, r in self.records.items()}

    def _patience(self, name: str) -> int:
        return self.block.evaluations if name == "over_optimisation" else self.block.patience

    def state(self) -> dict[str, Any]:
        """What `load` needs to continue; JSON-serialisable."""
        return {
            "steps": self.steps,
            "first": dict(self.first),
            "best": asdict(self.best) if self.best else None,
            "records": {name: asdict(record) for name, record in self.records.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue where a Watch of the same block stood when it returned `state`."""
        self.steps, self.first = state["steps"], dict(state["first"])
        self.best = Best(**state["best"]) if state["best"] else None
        self.records = {name: Record(**record) for name, record in state["records"].items()}

    def _note(self, name: SignalName, holds: bool, unit: str, found: str, advice: str) -> list[Raised]:
        """Count one measurement of a condition; the signal, at the one that completes the patience."""
        record = self.records.setdefault(name, Record())
        if not holds:
            record.running = 0
            return []
        if record.running == 0:
            record.since = self.steps
        record.running += 1
        record.held += 1
        if record.running != self._patience(name):
            return []
        record.raised += 1
        times = f"{record.running} {unit}{'s' if record.running > 1 else ''}"
        return [Raised(name, f"{name}: {found}, for {times}, since step {record.since}: {advice}")]
