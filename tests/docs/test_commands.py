"""What the pages tell to type works: blocks are run, those marked `<!-- needs: … -->` are parsed by what they call."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli import commands as relay
from tests.docs.commands import NEEDS, Block, blocks, marked, words
from tests.docs.test_metrics import missing

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [page for page in PAGES if any(not block.needs for block in blocks(page))]
MARKED = [page for page in PAGES if any(True for _ in marked(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.fast
def test_needs_are_known() -> None:
    unknown = {
        need: name(page) for page in PAGES for block in blocks(page) for need in block.needs if need not in NEEDS
    }
    assert unknown == {}


@pytest.mark.fast
@pytest.mark.parametrize("page", MARKED, ids=name)
def test_what_is_not_run_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line, command in marked(page):
        where = f"{name(page)}:{line}: {' '.join(command)}"
        if command[0] == "relay":
            parse_relay(command[1:], where)
        elif command[0] == "python":
            parse_script(ROOT / command[1], command[2:], where, monkeypatch)
        elif command[0].startswith("./scripts/"):
            assert (ROOT / command[0]).stat().st_mode & 0o100, where
            subprocess.run(["bash", "-n", ROOT / command[0]], check=True)


@pytest.mark.parametrize("page", RUN, ids=name)
def test_what_is_typed_runs(page: Path, place: Path) -> None:
    for block in blocks(page):
        if not block.needs:
            run(block, page)


def test_metrics_of_a_real_run_are_documented(quickstart: Path) -> None:
    names = set()
    for stage in ("sft", "reward", "ppo", "evaluate"):
        manifest = json.loads((quickstart / stage / "output" / "manifest.json").read_text(encoding="utf-8"))
        names |= set(manifest["metrics"])
        if stage != "evaluate":
            lines = (quickstart / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            names |= {key for line in lines for key in json.loads(line)} - {"step", "time"}
    assert {"loss", "accuracy", "objective/kl", "judge/win_rate"} <= names
    assert missing(names) == []


def run(block: Block, page: Path) -> None:
    """Type a block: `relay` in this process, which has torch already, all else in a shell."""
    where = f"{name(page)}:{block.line}"
    shell: list[str] = []
    for line in [*block.lines, "relay"]:
        piped = re.match(r"echo \"(.*)\" \| (relay .*)", line)
        if piped or line.startswith("relay"):
            if shell:
                done = subprocess.run(["bash", "-euc", "\n".join(shell)], capture_output=True, text=True)
                assert done.returncode == 0, f"{where}: {done.stderr}"
                shell = []
            if line != "relay":
                typed, text = (piped[2], f"{piped[1]}\n") if piped else (line, "")
                done = CliRunner().invoke(relay, words(typed)[1:], input=text)
                assert done.exit_code == 0, f"{where}: {line}\n{done.output}\n{done.exception}"
        else:
            shell.append(line)


def parse_relay(given: list[str], where: str) -> None:
    """Let the command line read a command, and run nothing."""
    command: Any = typer.main.get_command(relay)
    rest, parent = given, None
    try:
        while hasattr(command, "commands"):
            parent = command.make_context(where, rest, parent=parent)
            _, command, rest = command.resolve_command(parent, [*parent._protected_args, *parent.args])
        command.make_context(where, rest, parent=parent)
    except Exception as error:
        pytest.fail(f"{where}: {error}")


class Parsed(Exception):
    """A script has read its arguments."""


def parse_script(script: Path, given: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to where its arguments are read."""
    assert script.is_file(), where
    if "argparse" not in script.read_text(encoding="utf-8"):  # it takes none, and would start its work
        assert given == [], where
        return
    read = argparse.ArgumentParser.parse_args

    def stop(*arguments: Any, **options: Any) -> Any:
        read(*arguments, **options)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *given])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit as ended:
            pytest.fail(f"{where}: {ended}")
    pytest.fail(f"{where}: it reads no arguments")


@pytest.mark.fast
@pytest.mark.parametrize(
    "command",
    [
        "relay plan quickstart --device-memori 80",
        "relay shew quickstart",
        "relay data show",
        "python scripts/bench_ppo.py --raws fixed",
        "python scripts/gone.py",
        "python scripts/recipe_reference.py --out FILE",
    ],
)
def test_what_does_not_parse_is_told(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- needs: time -->\n```sh\n{command}\n```\n", encoding="utf-8")
    monkeypatch.setattr("tests.docs.test_commands.name", str)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_what_is_not_run_parses(page, monkeypatch)


@pytest.mark.fast
def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nrelay run RECIPE [--run-dir DIR] [RUN ...]  # why\nsome output\n```\n\n<!-- needs: gpu, hub -->\n\n"
        "```sh\nls\n```\n\n```yaml\nname: relay\n```\nA word, then `X=1 python scripts/a.py --b \\\n  c`.\n",
        encoding="utf-8",
    )
    first, second = blocks(page)
    assert first.commands == ["relay run RECIPE [--run-dir DIR] [RUN ...]  # why"]
    assert words(first.commands[0]) == ["relay", "run", "RECIPE", "--run-dir", "DIR", "RUN"]
    assert (first.needs, second.needs, second.lines) == (set(), {"gpu", "hub"}, ["ls"])
    assert list(marked(page)) == [(0, ["python", "scripts/a.py", "--b", "c"])]
