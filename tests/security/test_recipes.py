"""A recipe is data, writes into its run directory alone, and holds no secret."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import plain_yaml
from pipeline.config.recipe import load
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 10)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine letters that stand for a billion strings."""


def recipe(folder: Path, **changes: Any) -> Path:
    """A sound recipe of one stage with `changes`, as a file."""
    value = {
        "name": "r",
        "base": {"model": "m"},
        "stages": {"sft": {"kind": "sft", "data": [{"path": "d.jsonl"}], "lr": 1e-3}},
        **changes,
    }
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


def ppo(**source: Any) -> dict[str, Any]:
    block = {
        "kind": "ppo",
        "policy": "base",
        "reward": [source],
        "prompts": [{"path": "p.jsonl"}],
        "steps": 1,
        "lr": 1e-3,
    }
    return {"ppo": {**block, "critic": {"init": "policy"}}}


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, list(overrides))
    return str(caught.value)


def test_a_tag_that_makes_an_object_is_refused_in_one_paragraph(tmp_path: Path) -> None:
    """And nothing of it is run."""
    path = tmp_path / "r.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n", encoding="utf-8")
    command = [sys.executable, "-m", "pipeline.cli", "status", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().startswith(
        "recipe r.yaml: not valid YAML: could not determine a constructor for the tag"
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "made").exists()
    override = f"name=!!python/object/apply:os.mkdir ['{tmp_path}/made']"
    assert "is not valid YAML" in said(recipe(tmp_path), override)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOMB, "more than 100000 values once its aliases are written out"),
        ("a: &a [*a]\n", "more than 50 blocks inside each other"),
        ("[" * 1000, "more than 50 blocks inside each other"),
        ("seed: 1\nname: r\nseed: 2\n", "the key `seed` is written twice"),
        ("seed: 2026-99-99\n", "month must be in 1..12"),
    ],
    ids=["aliases of aliases", "a block inside itself", "deep", "a key twice", "no such day"],
)
def test_texts_that_are_no_plain_data(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.monotonic()
    assert f"recipe r.yaml: not valid YAML: {found}" in said(path)
    assert time.monotonic() - began < 5.0


def test_aliases_and_merged_blocks_of_honest_size_are_read() -> None:
    text = "a: &a {x: 1, y: [2, 3]}\nb: *a\nc: {<<: *a, x: 4}\n"
    assert plain_yaml.read(text) == {
        "a": {"x": 1, "y": [2, 3]},
        "b": {"x": 1, "y": [2, 3]},
        "c": {"x": 4, "y": [2, 3]},
    }


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".lock", "a\\b", "a\nb", "a\0b", "", "-x", "base"])
def test_names_of_stages_are_names_of_folders(name: str, tmp_path: Path) -> None:
    block = {"kind": "sft", "data": [{"path": "d.jsonl"}], "lr": 1e-3}
    assert f"{name!r} cannot be the name of a stage" in said(recipe(tmp_path, stages={name: block}))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", "a\n", ""])
def test_the_recipe_s_name_is_the_name_of_a_folder(name: str, tmp_path: Path) -> None:
    assert "recipe r.yaml: name: found" in said(recipe(tmp_path, name=name))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"tensorboard": {"enabled": True, "output_path": "/elsewhere"}}, "tensorboard"),
        ({"csv_monitor": {"enabled": True, "output_path": "/elsewhere"}}, "csv_monitor"),
        ({"wandb": {"enabled": True}}, "wandb"),
        ({"comet": {"enabled": True}}, "comet"),
        ({"nebula": {"enabled": True, "persistent_storage_path": "/elsewhere"}}, "nebula"),
        ({"autotuning": {"enabled": True, "results_dir": "/elsewhere"}}, "autotuning"),
        ({"flops_profiler": {"enabled": True, "output_file": "/elsewhere"}}, "flops_profiler.output_file"),
    ],
)
def test_deepspeed_does_not_write_elsewhere(config: dict[str, Any], key: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    assert f"has `{key}`, with which DeepSpeed writes outside" in said(
        recipe(tmp_path, deepspeed={"config": "ds.json"})
    )


def test_deepspeed_s_monitors_that_are_off_are_let_through(tmp_path: Path) -> None:
    config = {"tensorboard": {"enabled": False, "output_path": "/x"}, "flops_profiler": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    assert load(recipe(tmp_path, deepspeed={"config": "ds.json"})).stages["sft"].deepspeed.config == "ds.json"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:swordfish@host/score",
        "https://swordfish@host/score",
        "https://host/score?api_key=swordfish",
        "https://host/score?n=1&access_token=swordfish",
        "https://host/score?X-Amz-Signature=swordfish",
        "https://host/score?password=swordfish",
    ],
)
def test_an_address_holds_no_secret(url: str, tmp_path: Path) -> None:
    """It would stand in manifests, and with --set in the list of processes; the message does not repeat it."""
    for message in (
        said(recipe(tmp_path, stages=ppo(http=url))),
        said(recipe(tmp_path, stages=ppo(http="https://host/")), f"stages.ppo.reward=[{{http: '{url}'}}]"),
    ):
        assert message.startswith("recipe r.yaml: stages.ppo.reward.0.http: the address has a")
        assert "key_env: NAME" in message
        assert "swordfish" not in message


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "data:,x", "host/score", "httpx://host"])
def test_endpoints_are_http(url: str, tmp_path: Path) -> None:
    assert "^https?://" in said(recipe(tmp_path, stages=ppo(http=url)))


def test_addresses_with_other_parameters_are_taken(tmp_path: Path) -> None:
    url = "https://host:8000/score?model=a@b&max_tokens=7&author=me"
    loaded: Any = load(recipe(tmp_path, stages=ppo(http=url, key_env="REWARD_TOKEN"))).stages["ppo"]
    assert (loaded.reward[0].http, loaded.reward[0].key_env) == (url, "REWARD_TOKEN")
