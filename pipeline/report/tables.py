"""Tables of a run: what evaluate stages found, samples, and a recipe's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RATES = {"win_rate": "win rate", "lc_win_rate": "win rate at equal length"}


def tested(metrics: dict[str, float], output: Path) -> dict[str, list[Row]]:
    """Win rates, changes from before to after, forgetting, and a reward model's calibration; empty ones are left out."""
    found = {
        "wins": wins(metrics),
        "changes": changes(metrics),
        "forgetting": rows(output / "forgetting.jsonl"),
        "calibration": rows(output / "reliability.jsonl"),
        "judges": judges(metrics),
    }
    return {name: table for name, table in found.items() if table}


def wins(metrics: dict[str, float]) -> list[Row]:
    """Each judge's win rate of after against before, with the ends of its 95 % interval."""
    found = []
    for name, value in metrics.items():
        judge, _, last = name.rpartition("/")
        if last in RATES and f"{name}_low" in metrics:
            interval = {"low": metrics[f"{name}_low"], "high": metrics[f"{name}_high"]}
            found.append({"judge": judge, "what": RATES[last], "value": value, **interval})
    return found


def changes(metrics: dict[str, float]) -> list[Row]:
    """What was measured of both policies."""
    pairs = [(name[: -len("/model")], name) for name in metrics if name.endswith("/model")]
    return [
        {"what": stem, "before": metrics[f"{stem}/against"], "after": metrics[name]}
        for stem, name in pairs
        if f"{stem}/against" in metrics
    ]


def judges(metrics: dict[str, float]) -> list[Row]:
    """Each reward model's accuracy with its interval, beside that of choosing the longer reply."""
    found = []
    for name, value in metrics.items():
        stem, _, last = name.rpartition("/")
        if name.startswith("reward_model/") and last == "accuracy" and f"{name}_low" in metrics:
            found.append(
                {
                    "model": stem.removeprefix("reward_model/"),
                    "accuracy": value,
                    "low": metrics[f"{name}_low"],
                    "high": metrics[f"{name}_high"],
                    "longer": metrics.get(f"{stem}/longer"),
                    "ece": metrics.get(f"{stem}/ece"),
                }
            )
    return found


def samples(found: list[Row]) -> Row:
    """Rows as columns' names and cells; a nested value becomes one column for each of its keys."""
    flattened = [flat(row) for row in found]
    columns = list(dict.fromkeys(name for row in flattened for name in row))
    return {"columns": columns, "rows": [[row.get(name) for name in columns] for row in flattened]}


def flat(value: Any, path: str = "") -> Row:
    """{dotted key: leaf} of nested mappings; a list is a leaf, as text."""
    if isinstance(value, dict):
        found: Row = {}
        for key, inner in value.items():
            found |= flat(inner, f"{path}.{key}" if path else str(key))
        return found
    leaf = value if isinstance(value, str | int | float | bool) or value is None else str(value)
    return {path: leaf}


def rows(path: Path, count: int | None = None) -> list[Row]:
    """The rows of a file of JSON lines, the first `count` or, below zero, the last; those that are torn are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    lines = [line for line in lines if line]
    if count is not None:
        lines = lines[:count] if count > 0 else lines[count:]
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
