"""The wheel: what is in it, and that it answers from a folder that holds nothing else of Relay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.modules import OWN, ROOT

pytestmark = pytest.mark.fast

DATA = ("*.json", "*.yaml", "*.jsonl", "*.safetensors", "py.typed", "assets/*")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    (source / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "scripts/slurm.sbatch"):
        shutil.copy(ROOT / name, source / name)
    for name in (*OWN, "tests"):
        shutil.copytree(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, stdout=subprocess.DEVNULL, timeout=120
    )
    (made,) = folder.glob("*.whl")
    return made


def test_holds_what_the_tree_has(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packages = {name for name in inside if name.split("/")[0] in OWN}
    wanted = {
        file.relative_to(ROOT).as_posix()
        for name in OWN
        for pattern in ("*.py", *DATA)
        for file in (ROOT / name).rglob(pattern)
        if file.is_file()
    }
    assert len(wanted) > 150
    assert packages == wanted
    assert {f"{name}/py.typed" for name in OWN} <= wanted
    info, data = (next(name for name in inside if part in name).split("/")[0] for part in (".dist-info/", ".data/"))
    others = {name for name in inside - packages if not name.startswith(info)}
    assert others == {f"{data}/data/share/relay/slurm.sbatch"}
    assert f"{info}/licenses/LICENSE" in inside
    texts = zipfile.ZipFile(wheel)
    assert "relay = pipeline.cli:app" in texts.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in texts.read(f"{info}/METADATA").decode()


def test_answers_from_a_folder_of_its_own(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    for folder in [site, *site.rglob("*/")]:
        folder.chmod(0o555)
    env = {**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"}

    def ask(*line: str) -> str:
        return subprocess.run(
            [sys.executable, *line], cwd=here, env=env, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    where = "import pipeline, stages, ds_configs; print(*(p.__path__[0] for p in (pipeline, stages, ds_configs)))"
    assert ask("-c", where).split() == [str(site / name) for name in OWN]
    assert "doctor" in ask("-m", "pipeline", "--help")
    assert "peak " in ask("-m", "pipeline", "plan", "quickstart")
    assert not [*here.iterdir()]
    new = {file.relative_to(site).as_posix() for file in site.rglob("*") if file.is_file()}
    new -= set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in new if not name.endswith(".pyc")} == set()
    for folder in [site, *site.rglob("*/")]:
        folder.chmod(0o755)
