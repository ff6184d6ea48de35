"""`relay serve`: a published policy behind OpenAI's HTTP interface, by `transformers serve`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.block import Dtype
from pipeline.config.kinds import POLICIES
from pipeline.errors import UserError
from pipeline.export import card, model
from pipeline.export.command import Run, RunDir, Stage, tell_of_code, whole
from pipeline.handoff import Baton
from pipeline.published import open_model, run_folder

CACHE = ".exports"
NEEDED = ("fastapi", "uvicorn", "openai")
"""What `transformers serve` asks for."""


def serve(
    run: Run,
    stage: Stage = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="nothing asks who calls: other addresses are for networks you trust")] = (
        "127.0.0.1"
    ),
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="default the base's")] = None,
    run_dir: RunDir = None,
) -> None:
    """Serve a policy over HTTP, as OpenAI's API has it.

    Merged; on this machine alone unless --host says otherwise.
    """
    check_installed()
    folder = run_folder(run, run_dir)
    baton = open_model(folder, stage, POLICIES)
    tell_of_code(baton)
    exported = cached(folder, baton, dtype)
    print(f"{exported} at http://{host}:{port}/v1 as model {exported.name}", flush=True)
    asked = command(exported, host, port, trust=model.held(baton).trust_remote_code)
    os.chdir(exported.parent)
    os.execv(asked[0], asked)  # nosec B606 # the memory that merging took is given back


def command(exported: Path, host: str, port: int, *, trust: bool) -> list[str]:
    """The command line that serves an exported model and no other, from the folder above it: clients ask for it by its name."""
    start = [sys.executable, "-m", "transformers.cli.transformers", "serve", exported.name]
    return [*start, "--host", host, "--port", str(port), *(["--trust-remote-code"] if trust else [])]


def cached(folder: Path, baton: Baton, dtype: Dtype | None = None) -> Path:
    """The whole model of a stage in the run's own folder, made when it is not there yet."""
    name = f"{baton.manifest['stage']}-{baton.content_hash[:12]}" + (f"-{dtype}" if dtype else "")
    target = (folder / CACHE / name).resolve()
    if not target.is_dir():
        model.check_merges(baton)

        def fill(fresh: Path) -> None:
            model.full(baton, fresh, dtype=dtype)
            card.write(folder, baton, fresh, form="full")

        try:
            whole(target, fill)
        except OSError:
            if not target.is_dir():  # another one made it meanwhile
                raise
    return target


def check_installed() -> None:
    """Raise UserError where what `transformers serve` needs is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            "relay serve",
            f"not installed: {', '.join(missing)}",
            expected="what `transformers serve` needs",
            fix='pip install "relay-rlhf[serve]"',
        )
