"""A run that has secrets in its environment: what its directory holds afterwards, and who may read it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline import checkpoint, handoff
from pipeline.config.schema import Base
from pipeline.errors import UserError
from pipeline.lock import run_lock
from pipeline.model import load
from tests.support import tiny
from tests.support.endpoint import reply, serving
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "HF_TOKEN": "hf_swordfishSwordfishSwordfish01",
    "REWARD_TOKEN": "bearer-swordfish-0123456789",
    "WANDB_MODE": "offline",
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass(frozen=True)
class Case:
    """A chain of SFT, whose best checkpoint is not its last, and PPO with an endpoint's scores; the command lines that held a
    secret while it ran, and what the endpoint was given as authorization."""

    recipe: Path
    run: Path
    command_lines: list[str]
    authorizations: set[str | None]

    def unpublished(self, folder: Path) -> Path:
        """A copy of the run directory as it was before anything was published."""
        run = folder / "run"
        shutil.copytree(self.run, run, symlinks=True)
        for stage in ("sft", "ppo"):
            shutil.rmtree(run / stage / "output")
        return run


@pytest.fixture(scope="module")
def case(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("secrets")
    given: set[str | None] = set()

    def lengths(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        given.add(request.headers["Authorization"])
        reply(request, json.dumps({"scores": [len(text) for text in asked["responses"]]}).encode())

    with serving() as server:
        server.script = lengths
        changes = {
            "tracking": {"wandb": {"project": "relay", "mode": "offline"}, "tensorboard": True},
            "stages__sft__steps": 2,
            "stages__sft__lr": 5.0,
            "stages__sft__lr_schedule": "constant",
            "stages__sft__warmup": 0,
            "stages__sft__save_every": None,
            "stages__sft__eval_every": 1,
            "stages__sft__publish": "best",
            "stages__ppo__steps": 2,
            "stages__ppo__save_every": 1,
            "stages__ppo__keep_checkpoints": 2,
            "stages__ppo__reward": [{"http": server.url, "key_env": "REWARD_TOKEN"}],
            "stages__ppo__critic": {"init": "policy"},
        }
        recipe = tiny.recipe(folder / "r.yaml", tiny_llama, **changes)
        value = yaml.safe_load(recipe.read_text())
        del value["stages"]["reward"]
        recipe.write_text(yaml.safe_dump(value, sort_keys=False))
        lines = chain(ranks, recipe, folder / "run")
        yield Case(recipe, folder / "run", lines, given)


def chain(ranks: Get, recipe: Path, run: Path) -> list[str]:
    asked = {"recipe": str(recipe), "run_dir": str(run), "secrets": SECRETS}
    return [line for found in ranks(2).call("tests.security.cases:chain", **asked) for line in found]


def test_secrets_are_in_no_file_and_in_no_command_line(case: Case) -> None:
    """Manifests, logs, samples, checkpoints, W&B's offline files and TensorBoard's."""
    assert case.authorizations == {f"Bearer {SECRETS['REWARD_TOKEN']}"}, "they were in use"
    files = [path for path in case.run.rglob("*") if path.is_file()]
    kinds = {".wandb", ".safetensors", ".pt", ".jsonl", ".json"}
    assert kinds <= {path.suffix for path in files}, "what is looked at"
    assert any("tfevents" in path.name for path in files)
    needles = [SECRETS[name].encode() for name in ("WANDB_API_KEY", "HF_TOKEN", "REWARD_TOKEN")]
    found = [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]
    for path in files:  # what torch saves is a zip; nothing in it is compressed, but that is torch's affair
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts = [archive.read(name) for name in archive.namelist()]
            found += [str(path) for part in parts if any(needle in part for needle in needles)]
    assert found == []
    assert case.command_lines == []


def test_the_manifest_names_the_variable(case: Case) -> None:
    block = json.loads((case.run / "ppo" / "output" / "manifest.json").read_text())["inputs"]["block"]
    assert block["reward"][0]["key_env"] == "REWARD_TOKEN"


def test_a_run_directory_is_its_owner_s(case: Case) -> None:
    assert case.run.stat().st_mode & 0o777 == 0o700


def test_outputs_hold_no_pickles(case: Case) -> None:
    for stage in ("sft", "ppo"):
        files = [path for path in (case.run / stage / "output").rglob("*") if path.is_file()]
        assert any(path.suffix == ".safetensors" for path in files)
        for path in files:
            assert path.suffix not in PICKLES
            assert not zipfile.is_zipfile(path)
            assert not path.read_bytes().startswith(b"\x80")  # how a pickle begins


@pytest.mark.parametrize("name", [f"weights{ending}" for ending in PICKLES] + ["deep/training_args.bin"])
def test_a_pickle_is_not_published(name: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / name).write_bytes(b"x")

    with pytest.raises(RuntimeError, match="no pickles"):
        handoff.publish(tmp_path, write, {})
    assert handoff.read_manifest(tmp_path) is None


def spoil(file: Path, ran: Path) -> None:
    """Replace a file by a pickle that makes `ran`."""
    torch.save({"module": Touch(ran)}, file)
    torch.load(file, weights_only=False)
    assert ran.exists(), "whoever reads it runs it"
    ran.unlink()


def pickles_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in PICKLES)


def test_a_checkpoint_with_another_pickle_is_set_aside_unread(ranks: Get, case: Case, tmp_path: Path) -> None:
    """The newest checkpoint of each stage, with every pickle replaced; the stage then publishes what it did before."""
    run, ran = case.unpublished(tmp_path), tmp_path / "ran"
    newest = {"sft": "checkpoint-2", "ppo": "step-2"}
    for stage, name in newest.items():
        files = pickles_of(run / stage / "checkpoints" / name)
        assert len(files) >= 4
        for file in files:
            spoil(file, ran)
    chain(ranks, case.recipe, run)
    assert not ran.exists()
    for stage, name in newest.items():
        assert (run / stage / "checkpoints" / f"{name}.damaged").is_dir()
        for file in (case.run / stage / "output").iterdir():
            assert (run / stage / "output" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_file_that_was_added_to_a_checkpoint_is_not_read(case: Case, tmp_path: Path) -> None:
    """DeepSpeed takes what its patterns find."""
    run, ran = case.unpublished(tmp_path), tmp_path / "ran"
    checkpoints = run / "ppo" / "checkpoints"
    spoil(checkpoints / "step-2" / "engine" / "zero_pp_rank_7_mp_rank_00_optim_states.pt", ran)
    added = "engine/zero_pp_rank_7_mp_rank_00_optim_states.pt is not in COMPLETE.json"
    assert checkpoint.damage(checkpoints / "step-2") == added
    assert checkpoint.newest(checkpoints) == checkpoints / "step-1"


def test_the_best_checkpoint_is_looked_at_too(ranks: Get, case: Case, tmp_path: Path) -> None:
    """Transformers reads it at the end of the training; the last one was looked at when it began."""
    run, ran = case.unpublished(tmp_path), tmp_path / "ran"
    best = run / "sft" / "checkpoints" / "checkpoint-1"
    # Checkpoints know their best one by its path: here that of the first run.
    state = run / "sft" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace(str(case.run), str(run)))
    checkpoint.complete(state.parent, {key: checkpoint.facts(state.parent)[key] for key in ("step", "finished")})
    assert json.loads(state.read_text())["best_model_checkpoint"] == str(best), "the first evaluation was the best"
    for file in pickles_of(best):
        spoil(file, ran)
    asked = {"recipe": str(case.recipe), "stage": "sft", "run_dir": str(run)}
    for message in ranks(2).call("tests.support.stages:refused", **asked):
        assert message.startswith(f"{best}: the best checkpoint is damaged: ")
    assert not ran.exists()


def test_random_states_are_read_without_running_code(case: Case) -> None:
    for rank in (0, 1):
        state = torch.load(case.run / "ppo" / "checkpoints" / "step-2" / f"random-{rank}.pt", weights_only=True)
        assert set(state) == {"python", "numpy", "torch", "device"}


def test_a_base_of_pickled_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    """Read when it holds tensors alone; one that runs code is refused in a paragraph and not run."""
    folder, ran = tmp_path / "bin", tmp_path / "ran"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    base, tok = Base(model=str(folder), dtype="fp32"), load.tokenizer(str(folder))
    assert torch.equal(
        load.causal(base, tok, sharded=False).state_dict()["model.norm.weight"], weights["model.norm.weight"]
    )
    spoil(folder / "pytorch_model.bin", ran)
    with pytest.raises(UserError, match="its weights are a pickle that holds more than tensors"):
        load.causal(base, tok, sharded=False)
    assert not ran.exists()


def test_a_new_run_directory_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with run_lock(tmp_path / "runs" / "mine"):
            assert (tmp_path / "runs" / "mine").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode, warned in ((0o750, False), (0o777, True)):
        tmp_path.chmod(mode)
        with run_lock(tmp_path):
            pass
        assert tmp_path.stat().st_mode & 0o777 == mode
        assert ("every user of this machine can write there" in capsys.readouterr().err) is warned


def test_publishing_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """A recipe cannot make links; whoever can write to the run directory can."""
    elsewhere, stage = tmp_path / "elsewhere", tmp_path / "stage"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    stage.mkdir()
    (stage / "output").symlink_to(elsewhere)
    handoff.publish(stage, lambda folder: (folder / "new").write_text("x") and None, {})
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]
    assert not (stage / "output").is_symlink()
    assert (stage / "output" / "new").read_text() == "x"
