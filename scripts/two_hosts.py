"""A chain on two hosts that are two network namespaces, with faults; writes docs/results/two_hosts.md. Wants root, ip, sshd.

PYTHONPATH=. python scripts/two_hosts.py [CASE ...]
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pages
import psutil

from tests.faults.test_resume import SLOW, start, wait_for_step
from tests.support import tiny
from tests.support.hosts import FIRST, SECOND, TwoHosts, why_not

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "two_hosts.md"
HEADING = "## What was tried"
STAGES = ("sft", "reward", "ppo")


class Bench:
    """A folder with the recipe for one host and for two, and what the undisturbed one-host run published."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, tiny.model(folder / "llama")
        self.one = tiny.recipe(folder / "one.yaml", self.base, **SLOW)
        process = start(self.one, folder / "one")
        assert process.wait() == 0, process.stdout.read() if process.stdout else ""
        self.expected = published(folder / "one")
        self.count = 0

    def hosts(self, *, apart: bool = False) -> tuple[TwoHosts, Path, Path]:
        """New hosts, the recipe over them, and a new run directory."""
        self.count += 1
        run, keys = self.folder / f"run-{self.count}", self.folder / f"hosts-{self.count}"
        run.mkdir()
        place = TwoHosts(keys, apart=[run] if apart else [])
        spread = {"config": "zero2", "num_gpus": 1, "num_nodes": 2, "hostfile": str(place.hostfile)}
        return place, tiny.recipe(self.folder / "two.yaml", self.base, **{**SLOW, "deepspeed": spread}), run

    def finish(self, place: TwoHosts, recipe: Path, run: Path, stage: str = "ppo") -> str:
        """Run again up to `stage`; whether what is published equals the one-host run's."""
        again = place.relay("run", str(recipe), "--run-dir", str(run), "--until", stage, log=run / "again.log")
        code = again.wait()
        place.quiet(10.0)
        found = re.search(r"interrupted; resumes from step \d+", (run / "again.log").read_text())
        resumed = f", {found[0].partition('; ')[2]}" if found else ""
        ours = published(run)
        stages = {name.partition("/")[0] for name in ours}
        expected = {name: value for name, value in self.expected.items() if name.partition("/")[0] in stages}
        same = "identical" if stage in stages and ours == expected else "DIFFERENT"
        return f"{same}{resumed}" if code == 0 else f"FAILED with {code}"


def published(run: Path) -> dict[str, str]:
    """sha256 of every file that stages published, manifests left out."""
    return {
        f"{stage}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for stage in STAGES
        for file in sorted((run / stage / "output").glob("*"))
        if file.name != "manifest.json"
    }


def undisturbed(bench: Bench) -> list[str]:
    place, recipe, run = bench.hosts()
    with place:
        return ["nothing", "0", "", "", "", bench.finish(place, recipe, run)]


def refused(name: str, before: Callable[[TwoHosts], None], apart: bool) -> Callable[[Bench], list[str]]:
    def case(bench: Bench) -> list[str]:
        place, recipe, run = bench.hosts(apart=apart)
        with place:
            before(place)
            began = time.monotonic()
            process = place.relay("run", str(recipe), "--run-dir", str(run), log=run / "log")
            code, seconds = process.wait(), time.monotonic() - began
            return [
                name,
                str(code),
                f"{seconds:.0f}",
                f"{place.quiet(60.0):.1f}",
                said(run / "log", run),
                "not started",
            ]

    return case


def struck(
    name: str, stage: str, step: int, strike: Callable[[TwoHosts, psutil.Process], None]
) -> Callable[[Bench], list[str]]:
    """Do something in the middle of a stage; then the same command again."""

    def case(bench: Bench) -> list[str]:
        place, recipe, run = bench.hosts()
        with place:
            process = place.relay("run", str(recipe), "--run-dir", str(run), "--until", stage, log=run / "log")
            wait_for_step(run, stage, step, process, timeout=400.0)  # type: ignore[arg-type]
            began = time.monotonic()
            strike(place, psutil.Process(process.pid))
            code, seconds = process.wait(), time.monotonic() - began
            place.quiet(120.0)
            gone = time.monotonic() - began
            place.cable(up=True)
            result = bench.finish(place, recipe, run, stage)
            return [
                f"{name}, {stage} step {step}",
                str(code),
                f"{seconds:.0f}",
                f"{gone:.0f}",
                said(run / "log", run),
                result,
            ]

    return case


def cut(place: TwoHosts, _: psutil.Process) -> None:
    place.cable(up=False)


def killed(place: TwoHosts, relay: psutil.Process) -> None:
    relay.kill()


def stopped(place: TwoHosts, relay: psutil.Process) -> None:
    relay.terminate()


def hurried(place: TwoHosts, relay: psutil.Process) -> None:
    relay.terminate()
    time.sleep(0.1)
    relay.terminate()


def dead(place: TwoHosts, _: psutil.Process) -> None:
    """All processes of the second host but its sshd, at once."""
    for pid in place.processes(place.names[1]):
        os.kill(pid, signal.SIGKILL)


def dead_rank(place: TwoHosts, _: psutil.Process) -> None:
    ranks = [pid for pid in place.processes(place.names[1]) if "--local_rank=0" in psutil.Process(pid).cmdline()]
    os.kill(ranks[0], signal.SIGKILL)


def said(log: Path, run: Path) -> str:
    """The first line of the paragraph that says what happened; without one, the line that ends the stage."""
    text = log.read_text().replace(str(run), "RUN")
    found = re.findall(r"^(?:host|run directory) .*", text, re.MULTILINE) or re.findall(
        r"^\w+  (?:failed:|stopped) .*", text, re.MULTILINE
    )
    return found[-1] if found else ""


CASES: dict[str, Callable[[Bench], list[str]]] = {
    "undisturbed": undisturbed,
    "cut-sft": struck("cable cut", "sft", 20, cut),
    "cut-reward": struck("cable cut", "reward", 12, cut),
    "cut-ppo": struck("cable cut", "ppo", 10, cut),
    "dead": struck("all processes of the second host killed", "reward", 12, dead),
    "rank": struck("the rank on the second host killed", "reward", 12, dead_rank),
    "killed": struck("`relay run` killed", "reward", 12, killed),
    "stopped": struck("SIGTERM to `relay run`", "reward", 12, stopped),
    "hurried": struck("SIGTERM to `relay run`, twice", "reward", 12, hurried),
    "unreachable": refused("cable cut before the start", lambda place: place.cable(up=False), False),
    "apart": refused("run directory not shared", lambda place: None, True),
}


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = []
        for name in sys.argv[1:] or CASES:
            rows.append(CASES[name](bench))
            print(" | ".join(rows[-1]), flush=True)
    if sys.argv[1:]:
        return
    head = "| fault | exit code | s to the exit | s to no process left | the user reads | the same command again |"
    table = "\n".join([head, "|---|---|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])
    if not PAGE.is_file():
        PAGE.write_text(
            "# Two hosts\n\nWhat is done about each of these: [docs/hosts.md](../hosts.md).\n", encoding="utf-8"
        )
    pages.put(PAGE, HEADING, f"{INTRO}\n\n{table}")


INTRO = f"""`PYTHONPATH=. python scripts/two_hosts.py` {pages.measured_on("torch", "deepspeed")}: two network namespaces
joined by a veth pair as the hosts {FIRST} and {SECOND}, an sshd in the second, one rank on each; SFT, reward model and PPO of
a small random Llama under ZeRO-2. Seconds are from the fault on. "identical": every published file has the sha256 of the file
that the same recipe published on one host with two ranks, undisturbed. The machine did other work at the same time."""


if __name__ == "__main__":
    main()
