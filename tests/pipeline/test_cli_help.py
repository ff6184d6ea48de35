"""What one sees before knowing Relay: a help that fits the screen, and what the Tab key offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.recipe import SHIPPED

pytestmark = pytest.mark.fast

RELAY = Path(sys.executable).parent / "relay"


def relay(*arguments: str, cwd: Path | None = None, **env: str) -> str:
    given = {**os.environ, "COLUMNS": "80", "LINES": "24", **env}
    done = subprocess.run(
        [RELAY, *arguments], cwd=cwd, env=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def complete(line: str, cwd: Path | None = None) -> list[str]:
    """What bash gets for a Tab at the end of `line`, as the function that `--install-completion` installs asks for it."""
    return relay(cwd=cwd, _RELAY_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(line.count(" "))).split()


def test_help_fits_a_screen() -> None:
    lines = relay("--help").splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    shown = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in shown][:2] == ["run", "status"]
    assert shown[-1].split()[0] == "doctor"
    assert all(line.endswith(".") and not line.endswith("...") for line in shown), "one line each, none cut"


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_help_of_commands(command: str) -> None:
    lines = relay(command, "--help").splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert "..." not in "".join(lines).replace("[ARGS]...", "")


def test_completion(tmp_path: Path) -> None:
    stages = list(yaml.safe_load((SHIPPED / "quickstart.yaml").read_text())["stages"])
    (tmp_path / "mine.yaml").write_text("stages: {first: {}, second: {}}\n")
    (tmp_path / "broken.yaml").write_text("stages: [\n")
    (tmp_path / "more").mkdir()
    assert complete("relay run m", tmp_path) == ["mods", "mine.yaml", "more/"]
    assert complete("relay show quickstart ") == stages
    assert complete("relay run quickstart --until p") == ["ppo"]
    assert complete("relay run mine.yaml --from ", tmp_path) == ["first", "second"]
    (tmp_path / "runs" / "quick-two").mkdir(parents=True)
    (tmp_path / "runs" / "quick-two" / ".lock").touch()
    assert complete("relay chat quick", tmp_path) == ["quick-two", "quickstart"]
    assert complete("relay run broken.yaml --from ", tmp_path) == []


def test_completion_can_be_installed() -> None:
    shown = relay("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_RELAY_COMPLETE=complete_bash" in shown


def test_python_m_pipeline() -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout
