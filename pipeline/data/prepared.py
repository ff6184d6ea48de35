"""What a prepare stage tells of its work: `report.json` for programs, `report.md` for people. Torch-free."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.data.steps import Count, Ledger

LIBRARIES = ("ftfy", "phonenumbers", "py3langid", "pyarrow", "rensa", "selectolax", "xxhash")
"""Whose version may change what comes out."""


def write_report(folder: Path, ledger: Ledger) -> None:
    """Both reports. They hold no time and no path of this machine: the same data gives the same bytes."""
    record = {
        "rows": {"read": sum(c["rows"] for c in ledger.sources.values()), "kept": ledger.kept},
        "steps": [_step(count) for count in ledger.counts.values()],
        "libraries": {name: version(name) for name in LIBRARIES},
        "sources": {name: dict(sorted(counts.items())) for name, counts in sorted(ledger.sources.items())},
    }
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text("\n".join(page(ledger)) + "\n", encoding="utf-8")


def summary(ledger: Ledger) -> list[str]:
    """One line for each step."""
    rows = [
        (c.step, f"{c.before:,}", f"{c.changed:,}", f"{c.before - c.after:,}", f"{c.after:,}") for c in _all(ledger)
    ]
    table = [("step", "before", "changed", "removed", "after"), *rows]
    widths = [max(len(line[column]) for line in table) for column in range(5)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]


def page(ledger: Ledger) -> list[str]:
    """The lines of report.md."""
    lines = ["# Prepared data", "", "| step | before | changed | removed | after |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {c.step} | {c.before} | {c.changed} | {c.before - c.after} | {c.after} |" for c in _all(ledger)]
    for count in _all(ledger):
        if not count.removed and not count.examples:
            continue
        lines += ["", f"## {count.step}", ""]
        lines += [f"- {reason}: {rows} rows" for reason, rows in sorted(count.removed.items())]
        for example in count.examples:
            lines += ["", f"{example['source']}: {example['file']}, row {example['row']}", ""]
            if "reason" in example:
                lines += [f"    {example['reason']} ({example['detail']})", f"    {_shown(example['text'])}"]
            else:
                lines += [f"    - {_shown(example['before'])}", f"    + {_shown(example['after'])}"]
    return lines


def _all(ledger: Ledger) -> list[Count]:
    return list(ledger.counts.values())


def _step(count: Count) -> dict[str, Any]:
    return {
        "step": count.step,
        "before": count.before,
        "changed": count.changed,
        "removed": dict(sorted(count.removed.items())),
        "after": count.after,
        "examples": count.examples,
    }


def _shown(text: str) -> str:
    """A text on one line, with what cannot be seen written out."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text)
