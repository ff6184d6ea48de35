"""A working directory with packages of Relay's own names: Relay's win, and a recipe's functions there are still found."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline import launch
from pipeline.modules import ROOT

pytestmark = pytest.mark.fast

NAMES = ("pipeline", "stages", "ds_configs")


@pytest.fixture
def clash(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    (tmp_path / "own_judge.py").write_text(
        "def judge(prompts, responses, rows):\n    return [7.0 for _ in responses]\n"
    )
    return tmp_path


def ask(arguments: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot be told; `relay run` refuses there")
def test_ranks_take_relays_own(clash: Path) -> None:
    """A rank runs as a module, as the launcher starts it; another module of its package is imported by a spawned worker."""
    env = launch.environment()
    found = ask([sys.executable, "-m", "pipeline.modules"], clash, env)
    assert found.returncode == 0, found.stderr
    program = """
        import multiprocessing, sys
        from pipeline.modules import add_working_directory
        from pipeline.scoring.function import load_function
        def stages():
            import stages
            return stages.__path__[0]
        if __name__ == "__main__":
            add_working_directory()
            print(load_function("own_judge:judge", "here")(["p"], ["r"], [{}]))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(stages) == sys.argv[1])
    """
    (clash / "rank.py").write_text(textwrap.dedent(program))
    found = ask([sys.executable, "rank.py", str(ROOT / "stages")], clash, env)
    assert found.stdout.split("\n")[:2] == ["[7.0]", "True"], found.stderr


def test_commands_take_relays_own(clash: Path) -> None:
    """`relay status` of a PPO asks its stage's package for the estimators."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    found = ask([str(Path(sys.executable).parent / "relay"), "status", "quickstart"], clash, env)
    assert found.returncode == 0, found.stderr
    assert "evaluate" in found.stdout
