"""What came out of a run, as a table in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import handoff
from pipeline.config.recipe import Recipe


def summary(recipe: Recipe, run_dir: Path, stages: list[str], console: Console) -> None:
    """Final metrics of each stage, the comparison of an evaluate stage, and where the outputs are."""
    table = Table("stage", "result", "value", title=f"{recipe.name}", title_justify="left")
    for stage in stages:
        manifest = handoff.read_manifest(run_dir / stage)
        if manifest is None:
            continue
        metrics = dict(manifest["metrics"])
        rows = _comparison(metrics) if manifest["kind"] == "evaluate" else [(k, f"{v:.4g}") for k, v in metrics.items()]
        for number, (name, value) in enumerate(rows):
            table.add_row(stage if number == 0 else "", name, value)
        table.add_section()
    console.print(table)
    for stage in stages:
        if recipe.stages[stage].kind == "evaluate":
            _samples(
                run_dir / stage / handoff.OUTPUT / "samples.jsonl", getattr(recipe.stages[stage], "show", 3), console
            )
    for stage in stages:
        console.print(f"{stage}: {run_dir / stage / handoff.OUTPUT}")


def _comparison(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Before and after side by side, and win rates with their intervals."""
    rows = []
    for name in metrics:
        stem, _, side = name.rpartition("/")
        if side == "model":
            rows.append((f"{stem}, before -> after", f"{metrics[stem + '/against']:.4g} -> {metrics[name]:.4g}"))
        elif side == "win_rate":
            low, high = metrics[name + "_low"], metrics[name + "_high"]
            rows.append((f"{stem}, win rate (95 % interval)", f"{metrics[name]:.3f} ({low:.3f} to {high:.3f})"))
    kl = metrics.get("kl")
    rows.append(("KL to the policy before, before -> after", f"0 -> {kl:.4g}"))
    rows.append(("held-out prompts", f"{metrics['prompts']:.0f}"))
    return rows


def _samples(path: Path, count: int, console: Console) -> None:
    table = Table("prompt", "reply before", "reply after", show_lines=True)
    for line in path.read_text(encoding="utf-8").split("\n")[:count]:
        if not line:
            continue
        row = json.loads(line)
        table.add_row(*(row[key].strip() for key in ("prompt", "before", "after")))
    console.print(table)
