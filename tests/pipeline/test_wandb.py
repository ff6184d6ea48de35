"""W&B by its own offline files and its own process; and that nothing it does or fails to do holds up training."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from pipeline import handoff
from pipeline.config.schema import Tracking, Wandb
from pipeline.report import tables
from pipeline.sinks import WAITING, Background, Published
from pipeline.tracking import Tracker
from tests.pipeline.test_tracking import SAMPLE, log, rows, tracker
from tests.support import runs
from tests.support.wandb_file import Offline, offline

OFFLINE = Wandb(mode="offline")


@pytest.fixture(autouse=True)
def _no_wandb_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DISABLED", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def _stop_wandb() -> Iterator[None]:
    yield
    wandb.teardown()


def published(run: Path, stage: str, settings: Wandb = OFFLINE) -> Offline:
    """What W&B's files hold of a stage that logs two rows and publishes."""
    manifest = handoff.read_manifest(run / stage)
    assert manifest is not None
    stream = Tracker(
        run / stage,
        Tracking(wandb=settings),
        run="quickstart",
        stage=stage,
        kind=manifest["kind"],
        config={"lr": 0.1},
        total_steps=2,
        resume_step=0,
        enabled=True,
    )
    with stream:
        stream.log(1, {"loss": 2.0, "objective/kl": 0.5})
        stream.samples(1, [SAMPLE])
        stream.log(2, {"loss": 1.0})
    parents = [(run / parent / "output", handoff.read_manifest(run / parent) or {}) for parent in manifest["parents"]]
    output = run / stage / "output"
    stream.published(Published(output, manifest, parents, tables.tested(manifest["metrics"], output)))
    stream.close()
    return offline(run / stage)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run(tmp_path_factory.mktemp("wandb") / "hh", steps=3)


@pytest.fixture(scope="module")
def ppo(chain: Path) -> Offline:
    return published(chain, "ppo")


def test_names_and_config(ppo: Offline) -> None:
    run = ppo.run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("relay", "hh", "ppo", "hh/ppo")
    assert list(run.tags) == ["quickstart"]
    assert {key: ppo.config[key] for key in ("recipe", "stage", "kind", "lr")} == {
        "recipe": "quickstart",
        "stage": "ppo",
        "kind": "ppo",
        "lr": 0.1,
    }
    assert ppo.metrics["loss"].min
    assert ppo.metrics["eval/score"].max


def test_rows_have_the_names_and_steps_of_the_file(ppo: Offline, chain: Path) -> None:
    for row, kept in zip(rows(chain / "ppo"), ppo.rows, strict=True):
        assert kept["_step"] == row["step"]
        assert {name: kept[name] for name in row if name not in ("step", "time")} == {
            name: value for name, value in row.items() if name not in ("step", "time")
        }


def test_tables_are_read_back(chain: Path) -> None:
    published(chain, "evaluate")
    found = {
        path.name.split("_")[0]: json.loads(path.read_text()) for path in chain.glob("evaluate/wandb/*/files/**/*.json")
    }
    assert found["samples"]["columns"] == ["step", "prompt", "reply", "score", "kl"]
    assert found["samples"]["data"] == [[1, "Why?", "Because.", 1.5, 0.25]]
    assert found["wins"]["data"] == [["judge", "win rate", 0.75, 0.65, 0.85]]
    assert found["forgetting"]["data"] == [list(runs.FORGOTTEN.values())]


def test_outputs_are_artifacts_with_their_lineage(ppo: Offline, chain: Path) -> None:
    """What PPO uses is, by name and digest, what SFT and the reward model logged."""
    (own,) = (artifact for artifact in ppo.logged if artifact.type == "model")
    manifest = handoff.read_manifest(chain / "ppo")
    assert manifest is not None
    assert (own.name, own.type) == ("hh-ppo", "model")
    assert json.loads(own.metadata)["content_hash"] == manifest["content_hash"]
    used = {artifact.name: artifact.digest for artifact in ppo.used}
    for stage in ("sft", "reward"):
        (logged,) = (a for a in published(chain, stage).logged if a.type == "model")
        assert used[f"hh-{stage}"] == logged.digest
    (data,) = (artifact for artifact in ppo.used if artifact.type == "dataset")
    assert json.loads(data.metadata)["sha256"] == "d" * 64


def test_a_parent_of_another_run_keeps_its_name(chain: Path, tmp_path: Path) -> None:
    """A merge stage, say, of this run with an adapter of another: W&B finds what that run logged. Names W&B would refuse
    are written as it has them."""
    other = tmp_path / "another run"
    (other / "sft").mkdir(parents=True)
    shutil.copytree(chain / "sft" / "output", other / "sft" / "output")
    manifest = handoff.read_manifest(chain / "ppo")
    parent = handoff.read_manifest(other / "sft")
    assert manifest is not None
    assert parent is not None
    shutil.copytree(chain / "ppo" / "output", tmp_path / "this" / "ppo" / "output")
    with tracker(tmp_path / "this" / "ppo", wandb=OFFLINE) as stream:
        work = Published(tmp_path / "this" / "ppo" / "output", manifest, [(other / "sft" / "output", parent)])
        stream.published(work)
    found = offline(tmp_path / "this" / "ppo")
    assert {a.name for a in found.used if a.type == "model"} == {"another-run-sft"}
    assert [a.name for a in found.logged if a.type == "model"] == ["this-ppo"]


def entries(found: Offline) -> dict[str, str]:
    (own,) = (artifact for artifact in found.logged if artifact.type == "model")
    return {entry.path: entry.ref for entry in own.manifest.contents}


def test_whose_files_are_uploaded(tmp_path: Path) -> None:
    """Of an adapter all files; of a full model its manifest, and where it lies; all of it when the recipe says so."""
    run = runs.run(tmp_path / "hh", steps=2)
    address = (run / "sft" / "output").resolve().as_uri()
    assert entries(published(run, "sft")) == {
        "manifest.json": "",
        "output/manifest.json": f"{address}/manifest.json",
        "output/model.txt": f"{address}/model.txt",
    }
    assert entries(published(run, "reward", Wandb(mode="offline", artifacts="all"))) == {
        "manifest.json": "",
        "model.txt": "",
    }
    (run / "ppo" / "output" / "adapter_config.json").write_text("{}")
    assert entries(published(run, "ppo")) == {"manifest.json": "", "model.txt": "", "adapter_config.json": ""}


def test_a_resume_goes_on_in_the_same_run_and_a_new_start_does_not(tmp_path: Path) -> None:
    log(tmp_path, 1, 3, wandb=OFFLINE)
    log(tmp_path, 3, 4, resume=2, wandb=OFFLINE)
    assert len({file.stem for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 1
    assert [row["_step"] for row in offline(tmp_path).rows] == [1, 2, 3, 3, 4], "W&B itself leaves out a step it has"
    log(tmp_path, 1, 1, wandb=OFFLINE)
    assert len({file.stem for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 2


def test_its_process_killed_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wandb.teardown()
    with tracker(tmp_path, wandb=OFFLINE) as stream:
        stream.log(1, {"loss": 1.0})
        limit = time.monotonic() + 30
        while not list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
            assert time.monotonic() < limit
            time.sleep(0.05)
        for child in psutil.Process().children(recursive=True):
            if "wandb-core" in child.name():
                child.kill()
                child.wait()
        for step in range(2, 6):
            stream.log(step, {"loss": 1.0})
            time.sleep(0.05)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W&B")]
    assert len(told) == 1
    assert "left out from here on" in told[0]
    with suppress(ConnectionError):
        wandb.teardown()


ONLINE = """
import sys, time
from pathlib import Path
from pipeline import sinks
from pipeline.config.schema import Tracking, Wandb
from pipeline.tracking import Tracker
sinks.FINISH = 2.0
stream = Tracker(Path(sys.argv[1]), Tracking(wandb=Wandb()), run="hh", stage="sft", kind="sft", config={}, total_steps=9,
                 resume_step=0, enabled=True)
began = time.monotonic()
with stream:
    for step in range(1, 10):
        stream.log(step, {"loss": 1.0})
print("logged", time.monotonic() - began)
stream.close()
"""


@pytest.mark.parametrize("answers", [True, False], ids=["never answers", "refuses"])
def test_a_server_that_is_not_there(tmp_path: Path, answers: bool) -> None:
    """Training does not wait for it, and the process ends soon after its time is up. The key is said nowhere."""
    key = "k" * 40
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(50)
            threading.Thread(target=lambda: [server.accept() for _ in range(50)], daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": key}
        began = time.monotonic()
        command = [sys.executable, "-c", ONLINE, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("logged")[1]) < 1.0
    assert time.monotonic() - began < 30
    assert "did not finish within 2 s" in done.stderr
    assert len(rows(tmp_path)) == 9
    said = (
        done.stdout + done.stderr + "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    )
    assert key not in said


class Slow:
    """A sink whose every row takes until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.seen: list[int] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.go.wait()
        self.seen.append(step)

    def samples(self, step: int, table: list[dict[str, Any]]) -> None: ...

    def published(self, work: Published) -> None: ...

    def close(self) -> None: ...


@pytest.mark.fast
def test_a_slow_one_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    slow = Slow()
    sink = Background("W&B", lambda: slow, lambda: None)
    began = time.monotonic()
    for step in range(WAITING + 500):
        sink.do(lambda it, step=step: it.log(step, {}))  # type: ignore[misc]
    assert time.monotonic() - began < 5
    slow.go.set()
    sink.close()
    assert WAITING <= len(slow.seen) <= WAITING + 1
    left = WAITING + 500 - len(slow.seen)
    assert f"{left} rows were left out; metrics.jsonl has them all" in capsys.readouterr().err


class Run:
    """What W&B returns from init, as far as it is used."""

    def __init__(self) -> None:
        self.logged: list[int] = []

    def define_metric(self, name: str, summary: str) -> None: ...

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append(step)
        if step == 2:
            raise ConnectionError("the network is gone\nwith a second line")

    def finish(self) -> None: ...


@pytest.mark.fast
def test_one_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**settings: Any) -> None:
        raise wandb.errors.CommError("no server at that address\nand a long trace")

    monkeypatch.setattr(wandb, "init", init)
    log(tmp_path, 1, 3, wandb=Wandb())
    assert len(rows(tmp_path)) == 3
    assert capsys.readouterr().err.splitlines() == ["W&B is left out from here on: no server at that address"]


@pytest.mark.fast
def test_one_that_breaks_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    with tracker(tmp_path, wandb=Wandb()) as stream:
        for step in range(1, 5):
            stream.log(step, {"loss": 1.0})
    assert run.logged == [1, 2]
    assert len(rows(tmp_path)) == 4
    assert capsys.readouterr().err.splitlines() == ["W&B is left out from here on: the network is gone"]


@pytest.mark.fast
def test_disabled_it_is_not_even_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **settings: pytest.fail("W&B was started"))
    log(tmp_path, 1, 1, wandb=Wandb(mode="disabled"))
