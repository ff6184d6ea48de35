"""The `relay` command."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled
from typer.core import TyperGroup

from pipeline import chain, completion, faults, handoff, launch, modules, records
from pipeline.chat.command import chat
from pipeline.config.kinds import KINDS
from pipeline.config.recipe import Recipe, elsewhere, load, trusted, written
from pipeline.config.schema import Classify, Frozen
from pipeline.config.shortcuts import shortcuts
from pipeline.data import glue, split
from pipeline.data import show as data_show
from pipeline.doctor.finding import Finding
from pipeline.errors import EXIT_STOPPED, EXIT_TROUBLE, EXIT_USER_ERROR, UserError
from pipeline.export.command import export
from pipeline.lock import await_ranks, run_lock
from pipeline.memory import Need
from pipeline.report.command import dashboard, leave_report, report
from pipeline.serve import serve
from pipeline.summary import results, summary

ORDER = ["run", "status", "plan", "show", "report", "dashboard", "verify", "export", "chat", "serve", "data", "doctor"]


class _Ordered(TyperGroup):
    """Commands in the order in which one meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


commands = typer.Typer(
    cls=_Ordered,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain lines: all commands fit one screen of 80 columns
    help="RLHF in stages under DeepSpeed, one verified checkpoint from stage to stage.",
)
commands.add_typer(data_show.commands, name="data")
commands.command()(export)
commands.command()(chat)
commands.command()(serve)
commands.command()(report)
commands.command()(dashboard)
console = Console(highlight=False, soft_wrap=True)
PART_TITLES = {
    "adapters": "adapt",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "cache": "KV",
    "framework": "libs",
}

STATES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="a recipe file, or the name of a shipped recipe", autocompletion=completion.recipes
    ),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="folder of the run; default runs/<name>")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe")]
Ranks = Annotated[int | None, typer.Option("--num-gpus", help="ranks per host for every stage")]
Task = Annotated[str | None, typer.Option("--task", help="task of the recipe's classify stages, such as sst2")]
Method = Annotated[str | None, typer.Option("--method", help="what is trained: adapter.method")]
Folder = Annotated[
    Path | None, typer.Option("--data", help="folder of the task's official files; default the hub's copy")
]


def app() -> None:
    """Entry point: a user's mistake is one paragraph and exit code 2."""
    modules.add_working_directory()  # as ranks do: a recipe may name functions there
    try:
        commands()
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        trouble = faults.machine(error, Path.cwd())
        if trouble is None:
            raise
        print(f"\n{trouble}", file=sys.stderr)
        sys.exit(EXIT_TROUBLE)


def _open(
    name: str, run_dir: Path | None, overrides: list[str] | None, ranks: int | None
) -> tuple[Recipe, Path, list[str]]:
    given = list(overrides or [])
    recipe = load(name, given)
    if ranks is not None:
        given += [f"deepspeed.num_gpus={ranks}", *(f"stages.{s}.deepspeed.num_gpus={ranks}" for s in recipe.stages)]
        recipe = load(name, given)
    return recipe, run_dir or Path("runs") / recipe.name, given


@commands.command()
def run(
    recipe: RecipeName,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    ranks: Ranks = None,
    first: Annotated[
        str | None,
        typer.Option("--from", help="run this stage and what depends on it again", autocompletion=completion.stages),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="stop after this stage", autocompletion=completion.stages)
    ] = None,
    task: Task = None,
    method: Method = None,
    data: Folder = None,
) -> None:
    """Run the stages that are not up to date, and show the results."""
    loaded, folder, given = _open(recipe, run_dir, shortcuts(recipe, task, method, data) + (overrides or []), ranks)
    wanted, again = chain.selection(loaded, first, until), chain.redo(loaded, first)
    for model in dict.fromkeys(model for stage in wanted for model in trusted(loaded.stages[stage])):
        console.print(f"Python code that comes with {model} will be run (trust_remote_code)", markup=False)
    with ExitStack() as at_end, run_lock(folder):
        await_ranks(folder)
        for stage in loaded.stages:
            handoff.recover(folder / stage)

        @cache
        def begin() -> None:  # with the first stage that runs; where all is up to date nothing is written
            records.begin(folder, loaded, written(loaded.path, given), records.command())
            at_end.callback(leave_report, folder)

        for stage in wanted:
            _run_stage(loaded, stage, folder, given, begin, again=stage in again)
    summary(loaded, folder, wanted, console)


def _run_stage(
    recipe: Recipe, stage: str, run_dir: Path, given: list[str], begin: Callable[[], None], *, again: bool
) -> None:
    why = "asked to run again"
    if not again:  # what is published may be damaged, and is made anew then
        state = chain.state(recipe, stage, run_dir)
        why = state.why
        if state.done:
            console.print(f"[bold]{stage}[/bold]  {why}")
            return
    launch.check_devices(recipe, stage)
    for parent in recipe.parents(stage):
        handoff.open_baton(run_dir / parent)
    if isinstance(recipe.stages[stage], Classify):
        glue.places(recipe, stage)
    split.check(recipe, stage, run_dir)
    redo = run_dir / stage / chain.REDO
    if again and not redo.exists():
        shutil.rmtree(run_dir / stage / "checkpoints", ignore_errors=True)
        redo.parent.mkdir(parents=True, exist_ok=True)
        redo.touch()
    begin()
    console.print(f"[bold]{stage}[/bold]  starts: {why}")
    began, before = time.monotonic(), handoff.published(run_dir / stage)
    code = launch.run(recipe, stage, run_dir, given)
    if code == EXIT_STOPPED:
        console.print(f"[bold]{stage}[/bold]  stopped and saved; the same command goes on from there")
        raise typer.Exit(EXIT_STOPPED)
    if code == 0 and handoff.published(run_dir / stage) == before:
        code = -signal.SIGKILL  # the launcher itself was killed, of which `deepspeed` makes a success
    if code != 0:
        console.print(f"[bold]{stage}[/bold]  failed: {launch.ended(code)}; nothing published changed")
        raise typer.Exit(code if code in (EXIT_USER_ERROR, EXIT_TROUBLE) else 1)
    redo.unlink(missing_ok=True)
    manifest = handoff.open_baton(run_dir / stage).manifest
    console.print(
        f"[bold]{stage}[/bold]  published {manifest['content_hash'][:12]} in {time.monotonic() - began:.0f} s"
    )


@commands.command()
def status(
    recipe: RecipeName,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    ranks: Ranks = None,
    task: Task = None,
    method: Method = None,
    data: Folder = None,
) -> None:
    """Show which stages are done, which will run, and why.

    And what evaluate stages found.
    """
    loaded, folder, _ = _open(recipe, run_dir, shortcuts(recipe, task, method, data) + (overrides or []), ranks)
    table = Table("stage", "kind", "state", "why")
    for stage in loaded.order():
        state = chain.state(loaded, stage, folder)
        table.add_row(stage, loaded.stages[stage].kind, "done" if state.done else "to run", state.why)
    console.print(table)
    tested = [stage for stage in loaded.order() if loaded.stages[stage].kind == "evaluate"]
    if any(handoff.read_manifest(folder / stage) for stage in tested):
        console.print(results(loaded, folder, tested))


@commands.command()
def plan(
    recipe: RecipeName,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    ranks: Ranks = None,
    configs: Annotated[
        Path | None, typer.Option(help="folder of <org>__<name>/config.json, read instead of the hub")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--device-memory", metavar="GIB", help="plan for GPUs of this size; default: this machine"),
    ] = None,
    task: Task = None,
    method: Method = None,
    data: Folder = None,
) -> None:
    """Show commands and memory per rank, before anything is loaded.

    Memory is that of each phase. Exit code 2 when a stage does not fit the device.
    """
    from pipeline.memory import check, device, estimate, merged_copy_fits

    loaded, folder, given = _open(recipe, run_dir, shortcuts(recipe, task, method, data) + (overrides or []), ranks)
    for stage in loaded.order():
        block, where = loaded.stages[stage], device(loaded, stage, memory)
        line = " ".join(["deepspeed", *launch.command(loaded, stage, folder, given)[1:]])
        if not KINDS[block.kind].model:
            console.print(f"[bold]{stage}[/bold] ({block.kind})  no model\n{line}\n")
            continue
        sampling = getattr(block, "sampling", None) if block.kind == "ppo" else None
        merged = sampling is not None and sampling.adapter == "auto"
        merged = merged and merged_copy_fits(loaded, stage, where.bytes, where.kind, configs)
        need = estimate(loaded, stage, configs, where.kind, merged=merged)
        trained = "frozen" if isinstance(block, Frozen) else block.adapter.method
        quantized = " on nf4" if block.base.quantization else ""
        console.print(
            f"[bold]{stage}[/bold] ({block.kind})  {block.base.model}  {trained}{quantized}  {block.deepspeed.config}  "
            f"ranks: {block.deepspeed.ranks}  parameters: {need.parameters / 1e6:,.1f} M  "
            f"trained: {need.trained / 1e6:,.2f} M"
        )
        console.print(_memory(need))
        console.print(
            f"peak {need.gib:.2f} GiB per rank, in {need.peak}; headroom {where.bytes / 2**30 - need.gib:.2f} GiB of "
            f"{where.bytes / 2**30:.2f} ({where.name})"
            + ("; with room for rollouts by a copy" if merged and need.phases["rollout"].copy else "")
        )
        console.print(line + "\n")
    for stage in (name for name in loaded.order() if KINDS[loaded.stages[name].kind].model):
        check(loaded, stage, device(loaded, stage, memory), given, configs)


def _memory(need: Need) -> Table:
    """GiB per rank: a row for each phase of a stage, a column for each part that any of them has."""
    names = [
        name for name in vars(next(iter(need.phases.values()))) if any(vars(p)[name] for p in need.phases.values())
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("GiB", no_wrap=True)
    for name in [*(PART_TITLES.get(name, name) for name in names), "all"]:
        table.add_column(name, justify="right", no_wrap=True)
    for phase, parts in need.phases.items():
        row = [f"{value / 2**30:.2f}" for value in (*(getattr(parts, name) for name in names), parts.total)]
        table.add_row(phase, *row, style="bold" if phase == need.peak else None)
    return table


@commands.command()
def show(
    recipe: RecipeName,
    stage: Annotated[str | None, typer.Argument(help="a stage; default all", autocompletion=completion.stages)] = None,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    task: Task = None,
    method: Method = None,
    data: Folder = None,
) -> None:
    """Show what stages published: metrics, files and lineage."""
    loaded, folder, _ = _open(recipe, run_dir, shortcuts(recipe, task, method, data) + (overrides or []), None)
    for name in [stage] if stage else loaded.order():
        manifest = handoff.read_manifest(folder / name)
        if manifest is None:
            console.print(f"[bold]{name}[/bold]  nothing published")
            continue
        table = Table(
            title=f"{name} ({manifest['kind']})  {manifest['content_hash'][:12]}",
            show_header=False,
            title_justify="left",
        )
        table.add_row("output", str(folder / name / handoff.OUTPUT))
        if base := manifest["base"]:
            table.add_row("base", f"{base['model']}  {base['content_hash'][:12]}")
            table.add_row(
                "trained",
                f"{manifest['adapter']}, ZeRO-{manifest['zero_stage']}, {manifest['world_size']} ranks, "
                f"seed {manifest['seed']}",
            )
        table.add_row("parents", ", ".join(f"{p} {h[:12]}" for p, h in manifest["parents"].items()) or "none")
        for source in manifest["data"]:
            counts = ", ".join(f"{v} {k}" for k, v in source.items() if k not in ("path", "sha256"))
            table.add_row("data", f"{source['path']}  {source['sha256'][:12]}  {counts}")
        for key, value in manifest["metrics"].items():
            table.add_row(key, f"{value:.4g}")
        console.print(table)


@commands.command()
def verify(
    recipe: RecipeName,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    task: Task = None,
    method: Method = None,
    data: Folder = None,
) -> None:
    """Check published files against their hashes and parents.

    Every file of a run against its hash, and every stage against the parents it was made from.
    """
    loaded, folder, _ = _open(recipe, run_dir, shortcuts(recipe, task, method, data) + (overrides or []), None)
    for stage in loaded.order():
        if handoff.read_manifest(folder / stage) is None:
            console.print(f"[bold]{stage}[/bold]  nothing published")
            continue
        baton = handoff.open_baton(folder / stage)
        others = {part.name: Path(loaded.local(str(part.run))) / part.stage for part in elsewhere(loaded.stages[stage])}
        for parent, expected in baton.manifest["parents"].items():
            found = handoff.open_baton(others.get(parent, folder / parent)).content_hash
            if found != expected:
                raise UserError(
                    f"stage {stage}",
                    f"it was made from {parent} {expected[:12]}, which is now {found[:12]}",
                    fix=f"run it again: relay run {recipe} --from {stage}",
                )
        console.print(f"[bold]{stage}[/bold]  {len(baton.manifest['files'])} files verified  {baton.content_hash[:12]}")


@commands.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="what the machine is for; default: any recipe", autocompletion=completion.recipes
        ),
    ] = None,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    ranks: Ranks = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for programs")] = False,
) -> None:
    """Test this machine: compiler, packages, disks, GPUs, ranks.

    Each line says ok, warn or fail, what was found, and the fix. Slow checks are announced. Exit code 2 when one fails.
    """
    from pipeline.doctor import examine, finding

    loaded, folder = None, run_dir or Path("runs")
    if recipe is not None:
        loaded, folder, _ = _open(recipe, run_dir, overrides, ranks)
    case, found = finding.Case(loaded, folder), []
    for line in examine.examine(case, lambda what: print(f"…     {what}", file=sys.stderr, flush=True)):
        found.append(line)
        if not as_json:
            _tell(line)
    counts = {state: sum(line.state == state for line in found) for state in STATES}
    if as_json:
        print(json.dumps({"findings": [asdict(line) for line in found], **counts}))
    else:
        console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    raise typer.Exit(EXIT_USER_ERROR if counts["fail"] else 0)


def _tell(line: Finding) -> None:
    console.print(Styled.assemble((f"{line.state:5}", STATES[line.state]), f" {line.check}: {line.found}"))
    if line.fix:
        console.print(Styled(f"      fix: {line.fix}"))


if __name__ == "__main__":
    app()
