"""The three stages by hand with plain `deepspeed` commands give what `relay run` takes for its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.launch
def test_three_stages_script(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path / "tiny.yaml", tiny_llama)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MASTER_PORT": "29631"}
    script = subprocess.run(
        ["bash", str(ROOT / "scripts" / "three_stages.sh"), str(recipe), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240, env=env,
    )  # fmt: skip
    assert script.returncode == 0, script.stdout + script.stderr
    relay = subprocess.run(
        [str(Path(sys.executable).parent / "relay"), "run", str(recipe), "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=60, env=env,
    )  # fmt: skip
    assert relay.stdout.count("up to date") == 3, relay.stdout + relay.stderr
