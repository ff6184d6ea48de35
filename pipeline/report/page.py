"""The page of one run or several: a skeleton, our own styles and scripts, plotly's, and the data, in one HTML file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.handoff import replace
from pipeline.report.read import View, read_run

SCRIPTS = ("dom.js", "charts.js", "chain.js", "samples.js", "stage.js", "compare.js", "page.js")
"""In the order in which they build on each other."""

LIVE = (*SCRIPTS, "plotly.js", "live.js")
REPORT = "report.html"


def report(run_dirs: Sequence[Path], to: Path | None = None) -> Path:
    """Write the page of `run_dirs` to `to`, by default `report.html` in the first of them; where it is."""
    target = to or run_dirs[0] / REPORT
    replace(target, render([read_run(folder) for folder in run_dirs]).encode())
    return target


def render(views: Sequence[View], *, live: bool = False) -> str:
    """The page as HTML. It holds all it needs, unless `live`: then it asks the dashboard that serves it."""
    from jinja2 import Environment
    from markupsafe import Markup

    skeleton = Environment(autoescape=True, trim_blocks=True).from_string(asset("page.html.j2"))
    title = "Runs - Relay" if live else ", ".join(dict.fromkeys(view["name"] for view in views)) + " - Relay"
    about = {"title": title, "live": live, "footer": f"Relay {version('relay-rlhf')}"}
    if live:
        return skeleton.render(about, scripts=LIVE)
    scripts = [Markup(asset(name)) for name in SCRIPTS]  # nosec B704
    code = {"css": Markup(asset("page.css")), "plotly": Markup(asset("plotly.js"))}  # nosec B704
    return skeleton.render(about, **code, scripts=scripts, data=Markup(embedded(views)))  # nosec B704


def asset(name: str) -> str:
    """The text of one of the page's files."""
    if name == "plotly.js":
        return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return (files("pipeline.report") / "assets" / name).read_text(encoding="utf-8")


def embedded(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    text = dumps(value)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def dumps(value: Any) -> str:
    """JSON as browsers read it, which has no NaN and no infinity: null stands for them."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))
