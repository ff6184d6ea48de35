"""One metric stream of a stage, to JSONL always and to W&B and TensorBoard when the recipe says so; and its progress line.

Only rank 0 writes; on other ranks every call is a no-op.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.config.schema import Tracking
from pipeline.handoff import replace
from pipeline.records import note
from pipeline.sinks import Background, Guarded, Published, TensorBoard
from pipeline.wandb_sink import WandbSink, abandon

SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "objective/scores": "reward",
    "objective/kl": "kl",
    "tokens_per_second": "tok/s",
}
"""Metrics worth a place on the progress line, and what they are called there."""


class Tracker:
    """Writes `metrics.jsonl` in the stage's folder and forwards every row to the sinks of the recipe.

    A row is {"step": int, "time": seconds since the epoch, metric: float, …}. After a resume the rows beyond the resumed
    step are dropped first, so that the file reads as one undisturbed run.
    """

    def __init__(
        self,
        stage_dir: Path,
        tracking: Tracking,
        *,
        run: str,
        stage: str,
        kind: str,
        config: dict[str, Any],
        total_steps: int,
        resume_step: int,
        enabled: bool,
    ) -> None:
        self.enabled = enabled
        self._sinks: list[Guarded] = []
        if not enabled:
            return
        self._path = stage_dir / "metrics.jsonl"
        self._rewind(resume_step)
        note(stage_dir, "steps", first=resume_step, last=total_steps)
        self._stream = self._path.open("a", encoding="utf-8")
        if tracking.tensorboard:
            folder = stage_dir / "tensorboard"
            self._sinks.append(Guarded("TensorBoard", lambda: TensorBoard(folder, config, resume_step)))
        settings = tracking.wandb
        if settings is not None and settings.mode != "disabled":
            about: dict[str, Any] = {
                "recipe": run,
                "stage": stage,
                "kind": kind,
                "config": config,
                "resume_step": resume_step,
            }
            self._sinks.append(Background("W&B", lambda: WandbSink(stage_dir, settings, **about), abandon))
        self.progress = ProgressLine(stage, total_steps, resume_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.enabled:
            return
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        kept = dict(metrics)
        for sink in self._sinks:
            sink.do(lambda it: it.log(step, kept))
        self.progress.update(step, metrics)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of replies: of a rollout with its score and KL, or of two policies side by side; rows have the same keys."""
        if not self.enabled or not rows:
            return
        with (self._path.parent / "samples.jsonl").open("a", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        for sink in self._sinks:
            sink.do(lambda it: it.samples(step, rows))

    def published(self, work: Published) -> None:
        """What the stage handed on, for W&B's artifacts."""
        for sink in self._sinks:
            sink.do(lambda it: it.published(work))

    def warn(self, step: int, text: str) -> None:
        """A line of trouble for readers of the run, beside the metrics."""
        if self.enabled:
            with (self._path.parent / "warnings.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")

    def _rewind(self, step: int) -> None:
        for path in (self._path, *(self._path.parent / name for name in ("samples.jsonl", "warnings.jsonl"))):
            if path.exists():
                kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
                replace(path, b"".join(line + b"\n" for line in kept))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.progress.close()
            self._stream.close()

    def close(self) -> None:
        """Let W&B and TensorBoard finish; until then they take what is published."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _step_of(line: bytes) -> float:
    """The step of a metrics line; a torn line counts as beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ProgressLine:
    """A Rich bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, stage: str, total: int, start: int) -> None:
        self._stage, self._total, self._last, self._began, self._start = stage, total, 0.0, time.monotonic(), start
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._bar.start()
            self._task = self._bar.add_task(stage, total=total, completed=start, shown="")

    def update(self, step: int, metrics: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {metrics[key]:.4g}" for key, name in SHOWN.items() if key in metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if shown:
                self._bar.update(self._task, shown=shown)
        elif shown and (time.monotonic() - self._last > 5.0 or step >= self._total):
            self._last = time.monotonic()
            rate = (self._last - self._began) / max(step - self._start, 1)
            left = max(self._total - step, 0) * rate
            print(f"{self._stage}  step {step}/{self._total}  {shown}  left {left:.0f} s", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
