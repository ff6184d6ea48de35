"""One metric stream of a stage, to JSONL always and to W&B and TensorBoard when the recipe says so; and its progress line.

Only rank 0 writes; on other ranks every call is a no-op. W&B that cannot be reached never stops training.
"""

from __future__ import annotations

import json
import secrets
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
        config: dict[str, Any],
        total_steps: int,
        resume_step: int,
        enabled: bool,
    ) -> None:
        self.enabled, self.stage = enabled, stage
        self._sinks: list[Any] = []
        if not enabled:
            return
        self._path = stage_dir / "metrics.jsonl"
        self._rewind(resume_step)
        note(stage_dir, "steps", first=resume_step, last=total_steps)
        self._stream = self._path.open("a", encoding="utf-8")
        if tracking.tensorboard:
            self._sinks.append(TensorBoardSink(stage_dir / "tensorboard", resume_step))
        if tracking.wandb is not None and tracking.wandb.mode != "disabled":
            self._sinks.append(WandbSink(stage_dir, tracking.wandb, run, stage, config, resume_step))
        self.progress = ProgressLine(stage, total_steps, resume_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.enabled:
            return
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        for sink in self._sinks:
            sink.log(step, metrics)
        self.progress.update(step, metrics)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of replies: of a rollout with its score and KL, or of two policies side by side; rows have the same keys."""
        if not self.enabled or not rows:
            return
        with (self._path.parent / "samples.jsonl").open("a", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        for sink in self._sinks:
            sink.samples(step, rows)

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
            for sink in self._sinks:
                sink.close()


def _step_of(line: bytes) -> float:
    """The step of a metrics line; a torn line counts as beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _cell(value: Any) -> Any:
    """A value as a table shows it: text and numbers as they are, anything else as JSON."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


class TensorBoardSink:
    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        told = ["  \n".join(f"**{name}** {_cell(value)}" for name, value in row.items()) for row in rows]
        self._writer.add_text("samples", "\n\n".join(told), step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run per stage: group = the recipe's name, job type = the stage. A failing W&B is reported once and left."""

    def __init__(
        self, stage_dir: Path, settings: Any, run: str, stage: str, config: dict[str, Any], resume_step: int
    ) -> None:
        self._broken = False
        id_file = stage_dir / "wandb_run_id"
        try:
            import wandb

            again = resume_step > 0 and id_file.exists()
            run_id = id_file.read_text(encoding="utf-8") if again else secrets.token_hex(4)
            id_file.write_text(run_id, encoding="utf-8")
            self._wandb = wandb
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                group=run,
                job_type=stage,
                name=f"{run}/{stage}",
                id=run_id,
                resume="allow",
                config=config,
                dir=str(stage_dir),
                settings=wandb.Settings(silent=True, init_timeout=60),
            )
        except Exception as error:
            self._fail(error)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._try(lambda: self._run.log(dict(metrics), step=step))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = ["step", *rows[0]]
        data = [[step, *map(_cell, row.values())] for row in rows]
        self._try(lambda: self._run.log({"samples": self._wandb.Table(columns=columns, data=data)}, step=step))

    def close(self) -> None:
        self._try(lambda: self._run.finish())

    def _try(self, act: Any) -> None:
        if not self._broken:
            try:
                act()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._broken = True
        print(
            f"W&B is left out from here on: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            file=sys.stderr,
            flush=True,
        )


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
