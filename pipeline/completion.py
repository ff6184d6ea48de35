"""What the shell completes: names of recipes and of their stages. Nothing is checked here, so that a key press stays quick."""

from __future__ import annotations

import glob
from pathlib import Path

import typer

from pipeline.config.recipe import SHIPPED, find, parse
from pipeline.errors import UserError


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes by name; recipe files by path, and the folders on the way to them."""
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    started = glob.escape(incomplete)
    files = [*glob.glob(f"{started}*.yaml"), *glob.glob(f"{started}*.yml"), *glob.glob(f"{started}*/")]
    return [name for name in shipped if name.startswith(incomplete)] + sorted(files)


def runs(incomplete: str) -> list[str]:
    """Runs in runs/ by name, and what else names a run."""
    made = sorted(path.parent.name for path in Path("runs").glob("*/.lock"))
    return [*(name for name in made if name.startswith(incomplete)), *(n for n in recipes(incomplete) if n not in made)]


def stages(context: typer.Context, incomplete: str) -> list[str]:
    """Stages of the recipe that stands before on the line, in the order they are written."""
    names = [
        context.params.get("recipe"),
        context.params.get("run"),
        *context.args,
    ]  # left unread when an option without its value ends the line
    try:
        written = parse(find(str(next(filter(None, names), "")))).get("stages")
    except (UserError, OSError):
        return []
    return [str(name) for name in written if str(name).startswith(incomplete)] if isinstance(written, dict) else []
