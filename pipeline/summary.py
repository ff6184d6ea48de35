"""What came out of a run, as a table in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import handoff
from pipeline.config.recipe import Recipe


def summary(recipe: Recipe, run_dir: Path, stages: list[str], console: Console) -> None:
    """Final metrics of each stage, what an evaluate stage found, and where the outputs are."""
    console.print(results(recipe, run_dir, stages))
    for stage in stages:
        if recipe.stages[stage].kind == "evaluate":
            _samples(
                run_dir / stage / handoff.OUTPUT / "samples.jsonl", getattr(recipe.stages[stage], "show", 3), console
            )
    for stage in stages:
        console.print(f"{stage}: {run_dir / stage / handoff.OUTPUT}")


def results(recipe: Recipe, run_dir: Path, stages: list[str]) -> Table:
    """Final metrics of the published ones of `stages`."""
    table = Table("stage", "result", "value", title=f"{recipe.name}", title_justify="left")
    for stage in stages:
        manifest = handoff.read_manifest(run_dir / stage)
        if manifest is None:
            continue
        metrics = dict(manifest["metrics"])
        output = run_dir / stage / handoff.OUTPUT
        rows = (
            tested(metrics, output) if manifest["kind"] == "evaluate" else [(k, f"{v:.4g}") for k, v in metrics.items()]
        )
        for number, (name, value) in enumerate(rows):
            table.add_row(stage if number == 0 else "", name, value)
        table.add_section()
    return table


def tested(metrics: dict[str, float], output: Path) -> list[tuple[str, str]]:
    """What an evaluate stage found, by its parts."""
    rows = _comparison(metrics) if "prompts" in metrics else []
    return rows + _judged(metrics) + _forgotten(_lines(output / "forgetting.jsonl"))


def _judged(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Each reward model's accuracy beside that of the longer reply, its calibration, and other pairs."""
    rows = []
    for name in metrics:
        stem, _, last = name.rpartition("/")
        if last == "accuracy" and name.startswith("reward_model/"):
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            shown = f"{metrics[name]:.3f} ({low:.3f} to {high:.3f}); the longer reply {metrics[f'{stem}/longer']:.3f}"
            error = f"; calibration error {metrics[f'{stem}/ece']:.3f}" if f"{stem}/ece" in metrics else ""
            rows.append((f"{stem.removeprefix('reward_model/')}, pairwise accuracy (95 % interval)", shown + error))
        elif last == "agreement" and name.startswith("reward_model/"):
            kappa = f", kappa {metrics[f'{stem}/kappa']:.3f}" if f"{stem}/kappa" in metrics else ""
            shown = f"{metrics[name]:.3f}{kappa}"
            rows.append((f"{stem.removeprefix('reward_model/')}, members agree on", shown))
    return rows


def _forgotten(changes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each measure before and after, its change with the interval, and the verdict."""
    return [
        (
            f"{row['measure']}, {row['since']} -> {row['policy']}",
            f"{row['before']:.4g} -> {row['after']:.4g}: {row['change']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g}), "
            + row["verdict"],
        )
        for row in changes
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


RATES = {"win_rate": "win rate", "lc_win_rate": "win rate at equal length"}


def _comparison(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Before and after side by side, and win rates with their intervals."""
    rows = []
    for name in metrics:
        stem, _, side = name.rpartition("/")
        if side == "model":
            rows.append((f"{stem}, before -> after", f"{metrics[stem + '/against']:.4g} -> {metrics[name]:.4g}"))
        elif side in RATES:
            low, high = metrics[name + "_low"], metrics[name + "_high"]
            rows.append((f"{stem}, {RATES[side]} (95 %)", f"{metrics[name]:.3f} ({low:.3f} to {high:.3f})"))
    kl = metrics.get("kl")
    rows.append(("KL to the policy before, before -> after", f"0 -> {kl:.4g}"))
    rows.append(("held-out prompts", f"{metrics['prompts']:.0f}"))
    return rows


def _samples(path: Path, count: int, console: Console) -> None:
    rows = _lines(path)[:count]
    table = Table("prompt", "reply before", "reply after", show_lines=True)
    for row in rows:
        table.add_row(*(row[key].strip() for key in ("prompt", "before", "after")))
    if rows:
        console.print(table)
