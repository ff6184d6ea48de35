"""Where a stage's numbers go besides its own files. What fails there is told once and left; training goes on.

TensorBoard is written at once. W&B works in a thread of its own: however long its server takes, no step waits for it.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

FINISH = 60.0
"""Seconds that W&B gets at the end of a stage to send what it still has."""

WAITING = 1000
"""So many calls may wait for W&B; beyond that they are left out, and counted."""


@dataclass(frozen=True)
class Published:
    """What a stage handed on, for readers elsewhere: its folder and manifest, its parents' likewise, and tables to show."""

    path: Path
    manifest: dict[str, Any]
    parents: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Sink(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...

    def published(self, work: Published) -> None: ...

    def close(self) -> None: ...


Act = Callable[[Sink], None]


class Guarded:
    """A sink that may fail: the first error is told, and from then on it is left out."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self.name, self._make = name, make
        self._sink: Sink | None = None
        self._broken = False

    def do(self, act: Act) -> None:
        """Let the sink, made with its first use, do something."""
        if self._broken:
            return
        try:
            if self._sink is None:
                self._sink = self._make()
            act(self._sink)
        except Exception as error:
            self._broken = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say(f"is left out from here on: {reason}")

    def _say(self, what: str) -> None:
        print(f"{self.name} {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.do(lambda sink: sink.close())


class Background(Guarded):
    """A guarded sink that works in a thread: calls return at once. `abandon` ends what would hold up the process's exit."""

    def __init__(self, name: str, make: Callable[[], Sink], abandon: Callable[[], None]) -> None:
        super().__init__(name, make)
        self._abandon, self._dropped = abandon, 0
        self._acts: queue.Queue[Act | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, act: Act) -> None:
        try:
            self._acts.put_nowait(act)
        except queue.Full:
            self._dropped += 1

    def _work(self) -> None:
        while (act := self._acts.get()) is not None:
            super().do(act)

    def close(self) -> None:
        """Let it finish what waits, for a stated time."""
        if self._dropped:
            self._say(f"was too slow: {self._dropped} rows were left out; metrics.jsonl has them all")
        limit = time.monotonic() + FINISH
        with suppress(queue.Full):
            for act in (lambda sink: sink.close(), None):
                self._acts.put(act, timeout=max(0.0, limit - time.monotonic()))
        self._thread.join(max(0.0, limit - time.monotonic()))
        if self._thread.is_alive():
            self._broken = True
            self._say(f"did not finish within {FINISH:g} s and is left behind; `wandb sync` sends what its files hold")
            self._abandon()


class TensorBoard:
    """Scalars under their own names, samples and the stage's block as text. A resume hides what was written beyond it."""

    def __init__(self, folder: Path, config: dict[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        told = ["  \n".join(f"**{name}** {cell(value)}" for name, value in row.items()) for row in rows]
        self._writer.add_text("samples", "\n\n".join(told), step)

    def published(self, work: Published) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


def cell(value: Any) -> Any:
    """A value as a table shows it: text and numbers as they are, anything else as JSON."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)
