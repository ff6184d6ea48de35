"""Warm ranks: start the launcher once, then run many cases in the same processes. Importing the stack takes seconds a time."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any


class Ranks:
    """`world` processes under the `deepspeed` launcher that call functions `module:function` with JSON arguments."""

    def __init__(self, world: int, folder: Path) -> None:
        from pipeline.launch import environment, free_port

        self.world, self.folder, self.count = world, folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        env = environment()
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "deepspeed"),
                "--num_gpus",
                str(world),
                "--master_port",
                str(free_port()),
                "--log_level",
                "error",
                "--module",
                "tests.support.session",
                str(folder),
            ],
            env=env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def call(self, function: str, timeout: float = 240.0, **arguments: Any) -> list[Any]:
        """Each rank's return value. Raises AssertionError with the first failing rank's traceback."""
        task = self.folder / f"task-{self.count}.json"
        task.with_suffix(".part").write_text(json.dumps({"function": function, "arguments": arguments}))
        task.with_suffix(".part").rename(task)
        results = [self.folder / f"result-{self.count}-{rank}.json" for rank in range(self.world)]
        self.count += 1
        limit = time.monotonic() + timeout
        while not all(r.exists() for r in results):
            failed = next((v for r in results if r.exists() and (v := json.loads(r.read_text()))["error"]), None)
            if failed or self.process.poll() is not None or time.monotonic() > limit:
                self.close()
                log = (self.folder / "log.txt").read_text()[-4000:]
                raise AssertionError(failed["error"] if failed else f"{function}: no answer from every rank\n{log}")
            time.sleep(0.02)
        values = [json.loads(r.read_text()) for r in results]
        for value in values:
            if value["error"]:
                raise AssertionError(value["error"])
        return [value["value"] for value in values]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)  # nothing is under way; an orderly exit takes seconds
            self.process.wait()
        self.log.close()


def serve(folder: Path) -> None:
    """A rank's loop: take the next task, run it, answer; until the parent is gone."""
    from pipeline.lifeline import die_with_parents

    die_with_parents()
    rank, number = int(os.environ["RANK"]), 0
    while True:
        task = folder / f"task-{number}.json"
        if not task.exists():
            time.sleep(0.01)
            continue
        answer: dict[str, Any] = {"value": None, "error": ""}
        try:
            asked = json.loads(task.read_text())
            module, _, name = asked["function"].partition(":")
            answer["value"] = getattr(importlib.import_module(module), name)(**asked["arguments"])
        except BaseException:
            answer["error"] = f"rank {rank}:\n{traceback.format_exc()}"
        part = folder / f"result-{number}-{rank}.part"
        part.write_text(json.dumps(answer))
        part.rename(folder / f"result-{number}-{rank}.json")
        number += 1
        # What a task imported stays; the collections that a stage asks for need not walk through it each time.
        gc.collect()
        gc.freeze()


if __name__ == "__main__":
    serve(Path(sys.argv[-1]))
