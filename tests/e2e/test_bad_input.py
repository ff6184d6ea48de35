"""A user's mistake is one paragraph and exit code 2: no traceback, and nothing already written is lost or changed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import handoff
from tests.support import tiny
from tests.support.session import Ranks


@pytest.fixture(scope="module")
def finished(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A finished three-stage run: (recipe, run directory). Tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny.recipe(folder / "tiny.yaml", tiny_llama)
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(folder / "run"))
    return recipe, folder / "run"


def relay(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "relay"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})})


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def copy(finished: tuple[Path, Path], target: Path) -> Path:
    shutil.copytree(finished[1], target)
    return target


def test_up_to_date_and_verified(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """The second run finds everything up to date and changes nothing; verify, status and show agree."""
    recipe, run = finished
    before = contents(run)
    result = relay("run", str(recipe), "--run-dir", str(run))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("up to date") == 3
    assert contents(run) == before
    assert relay("verify", str(recipe), "--run-dir", str(run)).stdout.count("files verified") == 3
    status = relay(
        "status", str(recipe), "--run-dir", str(run), "--set", "stages.reward.lr=0.5", env={"COLUMNS": "160"}
    )
    assert "lr 0.01 -> 0.5" in status.stdout
    assert "waits for reward" in status.stdout
    assert "held_out/accuracy" in relay("show", str(recipe), "reward", "--run-dir", str(run)).stdout


def test_altered_output(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    weights = run / "sft" / "output" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    before = contents(run)
    result = relay("run", str(finished[0]), "--run-dir", str(run), "--set", "stages.ppo.lr=0.5")
    refused(result, "adapter_model.safetensors", "altered", "expected sha256", "--from sft")
    assert contents(run) == before
    refused(relay("verify", str(finished[0]), "--run-dir", str(run)), "adapter_model.safetensors")


def test_second_writer(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    with (run / ".lock").open("w") as stream:
        json.dump({"pid": os.getpid(), "host": "elsewhere"}, stream)
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        refused(relay("run", str(finished[0]), "--run-dir", str(run)), f"pid {os.getpid()} on elsewhere", "one writer")


def test_unreadable_data(finished: tuple[Path, Path], tmp_path: Path) -> None:
    refused(
        relay("run", str(finished[0]), "--run-dir", str(tmp_path / "a"), "--set", "stages.sft.data=[{path: none.jsonl}]"),
        "data none.jsonl", "no such file",
    )  # fmt: skip
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = relay(
        "run", str(finished[0]), "--run-dir", str(tmp_path / "b"), "--set", f"stages.sft.data=[{{path: {bad}}}]"
    )
    refused(result, "1 of 2 rows are bad", f"{bad}, row 2: missing: completion", "rejected.jsonl", "max_bad")
    assert result.stderr.count("1 of 2 rows are bad") == 1, "one rank says it, not all"


def test_too_few_gpus(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """With a driver that lists one GPU, a stage that wants two is refused before anything starts."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Some GPU (UUID: GPU-0)'\n")
    (fake / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{fake}:{os.environ['PATH']}", "DS_ACCELERATOR": ""}
    result = relay("run", str(finished[0]), "--run-dir", str(tmp_path / "run"), env=env)
    refused(result, "num_gpus", "2 GPUs wanted", "at most 1", "--num-gpus 1")
    assert not (tmp_path / "run" / "sft").exists()


def test_by_hand_without_upstream(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """A stage started by hand before its upstream says so, through the launcher, once."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29617", "--module",
               "stages.ppo", "--recipe", str(finished[0]), "--stage", "ppo", "--run-dir", str(tmp_path)]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    refused(result, "stages.ppo", 'upstream stage "sft" is not published', "--until sft")
    assert result.stderr.count("is not published") == 1


def republish(run: Path, stage: str, name: str, change: Callable[[bytes], bytes], **facts: object) -> None:
    """Publish a stage's output again with one file changed, as if it had been made so."""
    old = handoff.open_baton(run / stage)
    kept = {k: v for k, v in old.manifest.items() if k not in ("schema", "files", "content_hash")}
    files = {p.name: p.read_bytes() for p in old.path.iterdir() if p.name != handoff.MANIFEST}
    files[name] = change(files[name])

    def write(folder: Path) -> None:
        for file, content in files.items():
            (folder / file).write_bytes(content)

    handoff.publish(run / stage, write, {**kept, **facts})


def test_tokenizer_differs(ranks: Callable[[int], Ranks], finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    republish(run, "reward", "tokenizer.json", lambda content: content + b"\n")
    with pytest.raises(AssertionError, match=r"tokenizer of sft and reward: tokenizer\.json differs"):
        ranks(1).call("tests.distributed.cases:run_stage", recipe=str(finished[0]), stage="ppo", run_dir=str(run))


def test_adapter_of_another_base(ranks: Callable[[int], Ranks], finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    base = handoff.open_baton(run / "reward").manifest["base"]
    republish(run, "reward", "README.md" if (run / "reward/output/README.md").exists() else "tokenizer_config.json",
              lambda content: content, base={**base, "content_hash": "0" * 64})  # fmt: skip
    with pytest.raises(AssertionError, match="trained on another base"):
        ranks(1).call("tests.distributed.cases:run_stage", recipe=str(finished[0]), stage="ppo", run_dir=str(run))
