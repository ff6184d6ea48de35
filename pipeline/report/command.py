"""`relay report` and `relay dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from pipeline.published import run_folder


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or recipes run in runs/<name>")],
    to: Annotated[Path | None, typer.Option("--to", help="the file; default report.html in the first run")] = None,
) -> None:
    """Write one HTML page about a run, or several side by side.

    It opens without a network.
    """
    from pipeline.report.page import report as write

    print(f"report: {write([_existing(name) for name in runs], to)}")


def dashboard(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="a folder of runs, or one run")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8008,
    host: Annotated[
        str, typer.Option(help="off loopback a token is asked for: RELAY_DASHBOARD_TOKEN, or a new one")
    ] = "127.0.0.1",
) -> None:
    """Serve the page of every run, live, on this machine."""
    from pipeline.report.dashboard import serve

    if not runs.is_dir():
        raise UserError(f"runs {runs}", "no such folder", expected="a folder of runs, or one run", fix="ls")
    serve(runs, host, port)


def leave_report(run_dir: Path) -> None:
    """Write a run's page, however it ended. That it cannot be written changes nothing else."""
    try:
        from pipeline.report.page import report as write

        print(f"report: {write([run_dir])}")
    except Exception as error:  # whatever it is, it must not hide how the run ended
        print(f"no report was written: {type(error).__name__}: {error}")


def _existing(name: str) -> Path:
    """The folder of a run, as `run_folder` finds it. Raises UserError where no run is."""
    from pipeline.report.read import is_run

    folder = run_folder(name)
    if not is_run(folder):
        raise UserError(
            f"run {name}",
            f"no run in {folder}",
            expected="a folder that `relay run` made, or a recipe that was run",
            fix="run it first: relay run RECIPE",
        )
    return folder
