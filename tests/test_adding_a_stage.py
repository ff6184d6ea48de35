"""docs/adding_a_stage.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from pipeline import handoff
from pipeline.launch import free_port
from tests.support import tiny

NAMED = re.compile(r"`((?:pipeline|stages)/[\w/]+\.py)`")
BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)


def follow(page: str, root: Path) -> None:
    """Write every Python block into the file that is named last before it, and make every change of a diff: the text behind
    `-`, which a line begins with, becomes that behind `+`."""
    for found in BLOCK.finditer(page):
        file = root / NAMED.findall(page[: found.start()])[-1]
        kind, body = found.groups()
        if kind == "python":
            assert not file.exists()
            file.write_text(body)
            continue
        old, new = (
            "\n".join(line[1:] for line in body.rstrip("\n").split("\n") if line.startswith(sign)) for sign in "-+"
        )
        text = file.read_text()
        assert text.count("\n" + old) == 1, f"{file.name}: {old}"
        file.write_text(text.replace("\n" + old, "\n" + new))


def test_the_page_adds_a_stage(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("pipeline", "stages", "ds_configs"):
        shutil.copytree(tiny.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    follow((tiny.ROOT / "docs" / "adding_a_stage.md").read_text(), copy)

    stages = {
        "dft": {
            "kind": "dft",
            "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl"), "limit": 40}],
            "steps": 2,
            "batch": 4,
            "lr": 1e-2,
            "eval_rows": 8,
        },
        "sft": {"kind": "sft", "init": "dft", "data": [{"path": "none.jsonl"}], "lr": 1e-3},
    }
    recipe = tmp_path / "r.yaml"
    base = {"model": str(tiny_llama), "dtype": "fp32"}
    recipe.write_text(yaml.safe_dump({"name": "new", "base": base, "stages": stages}))
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **one, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(copy), "DS_ACCELERATOR": "cpu"}
    run = ["--recipe", str(recipe), "--stage", "dft", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "stages.dft", *run], capture_output=True, text=True, check=False, cwd=copy, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr

    baton = handoff.open_baton(tmp_path / "run" / "dft")
    assert (baton.manifest["kind"], baton.manifest["adapter"]) == ("dft", "lora")
    assert 0 < baton.manifest["metrics"]["held_out/loss"] < 10
