"""How fast the dashboard is with many long runs, in a real browser, and what it costs beside a training.

python scripts/bench_dashboard.py --out docs/results/dashboard.md
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pages import measured_on
from playwright.sync_api import sync_playwright

NAMES = [
    *(
        "objective/" + name
        for name in ("kl", "kl_coef", "entropy", "scores", "non_score_reward", "rlhf_reward", "length")
    ),
    *("val/" + name for name in ("num_eos_tokens", "truncated_responses", "identical_responses", "explained_variance")),
    *("val/clipfrac_avg", "policy/clipfrac_avg", "val/ratio", "policy/approxkl_avg", "policy/entropy_avg"),
    *("policy/updates", "loss/policy_avg", "loss/value_avg", "perf/padding_share", "lr/policy", "lr/critic"),
    *("grad_norm/policy", "grad_norm/critic", "time/rollout", "time/score", "time/train", "tokens_per_second"),
]
"""What a PPO stage logs."""

PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def row(step: int) -> str:
    return json.dumps({"step": step, "time": float(step), **{n: math.sin(step / 99 + i) for i, n in enumerate(NAMES)}})


def lay_down(root: Path, runs: int, steps: int) -> None:
    """Folders as `relay run` leaves them in the middle of PPO."""
    lines = "".join(row(step) + "\n" for step in range(1, steps + 1))
    for number in range(runs):
        folder = root / f"run-{number:03}"
        (folder / "ppo").mkdir(parents=True)
        (folder / ".lock").write_text("{}")
        stages = {"ppo": {"kind": "ppo", "upstream": [], "base": "base"}}
        (folder / "run.json").write_text(json.dumps({"name": "hh", "recipe": {"seed": number}, "stages": stages}))
        (folder / "ppo" / "launches.jsonl").write_text('{"event": "start", "time": 0.0, "ranks": 8}\n')
        (folder / "ppo" / "metrics.jsonl").write_text(lines)


def measure(address: str, process: psutil.Process, growing: Path) -> dict[str, float]:
    """Milliseconds until the list, a run and a comparison are there; and seconds of CPU while one run is watched."""
    found: dict[str, float] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()

        def until(what: str, act: Any) -> float:
            began = time.perf_counter()
            act()
            page.wait_for_selector(what)
            return 1000 * (time.perf_counter() - began)

        found["the list, first time: until all rows are there"] = until("text=run-099", lambda: page.goto(address))
        found["the list, first time: first contentful paint"] = page.evaluate(PAINT)
        found["the list again: until all rows are there"] = until("text=run-099", page.reload)
        found["the list again: first contentful paint"] = page.evaluate(PAINT)
        drawn = "#stage-ppo figure svg.main-svg"
        found["a run: until its first curve is drawn"] = until(drawn, lambda: page.goto(f"{address}#run=run-050"))
        compare = f"{address}#compare=run-001,run-002,run-003,run-004"
        both = "figure:has-text('ppo: objective/scores') svg.main-svg"
        found["four runs compared: until the first curve is drawn"] = until(both, lambda: page.goto(compare))
        page.goto(f"{address}#run={growing.parent.name}")
        page.wait_for_selector(drawn)
        before = process.cpu_times()
        step = 10_000
        for _ in range(20):
            with (growing / "metrics.jsonl").open("a") as stream:
                stream.write(row(step := step + 1) + "\n")
            time.sleep(1)
        spent = process.cpu_times()
        found["CPU of the server while a run that grows is watched"] = (
            1000 * (spent.user + spent.system - before.user - before.system) / 20
        )
        found["memory of the server"] = process.memory_info().rss / 2**20
        browser.close()
    return found


def unit(what: str) -> str:
    return " ms a second" if what.startswith("CPU") else " MiB" if what.startswith("memory") else " ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "runs"
        lay_down(root, arguments.runs, arguments.steps)
        command = [sys.executable, "-m", "pipeline.cli", "dashboard", str(root), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            found = measure(address, psutil.Process(server.pid), root / "run-050" / "ppo")
        finally:
            server.terminate()
            server.wait()
    lines = [
        "# The dashboard's speed",
        "",
        "`python scripts/bench_dashboard.py --out docs/results/dashboard.md`, "
        f"{measured_on('starlette', 'uvicorn', 'plotly')}.",
        "",
        f"{arguments.runs} runs of {arguments.steps:,} steps with {len(NAMES)} columns each, in Debian's Chromium on the same",
        "machine. The server is a process of its own that reads; a training neither waits for it nor knows of it.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value:,.0f}{unit(what)} |" for what, value in found.items()),
    ]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
