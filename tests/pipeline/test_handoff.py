"""The baton: published whole or not at all, hashed, verified when opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import handoff
from pipeline.errors import UserError
from pipeline.handoff import Baton, open_baton, publish

pytestmark = pytest.mark.fast

WEIGHTS = bytes(range(256)) * 8
BASE_HASH = "b" * 64


def facts(stage: str = "sft", **changed: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "kind": "sft",
        "inputs": {"block": {"lr": 0.1}},
        "parents": {},
        "metrics": {"loss": 1.5},
        "base": {"model": "models/base", "content_hash": BASE_HASH},
        **changed,
    }


def adapter(folder: Path, *, weights: bytes = WEIGHTS, base: str = "models/base", tokenizer: str = "tokens") -> None:
    """Fill `folder` as PEFT does."""
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 8}), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")


def writer(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: adapter(folder, **changed)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The folder of a published stage."""
    publish(tmp_path / "sft", writer(), facts())
    return tmp_path / "sft"


def weights(stage: Path) -> bytes:
    return (open_baton(stage).path / "adapter_model.safetensors").read_bytes()


# What is published.


def test_published_is_what_was_written(stage: Path) -> None:
    baton = open_baton(stage)
    assert baton.path == stage / "output"
    assert baton.is_adapter
    assert baton.base == "models/base"
    assert weights(stage) == WEIGHTS
    files = baton.manifest["files"]
    assert list(files) == ["adapter_config.json", "adapter_model.safetensors", "templates/chat.jinja", "tokenizer.json"]
    assert files["templates/chat.jinja"] == "f24189f08c85a1eb19a737306c3a13e85462ee33d964f28108d64a2485fa2171"
    assert baton.manifest["metrics"] == {"loss": 1.5}
    assert [p.name for p in stage.iterdir()] == ["output"]


def test_a_full_model_is_its_own_base(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(WEIGHTS)

    baton = publish(tmp_path / "sft", write, facts())
    assert not baton.is_adapter
    assert baton.base == str(baton.path)


def test_what_nobody_published_is_said(tmp_path: Path) -> None:
    assert handoff.read_manifest(tmp_path / "sft") is None
    with pytest.raises(UserError, match=r"stage sft: nothing is published in .*\n.*\n  fix: .*--from sft"):
        open_baton(tmp_path / "sft")


# Atomic.


def test_a_write_that_fails_leaves_the_old_output(stage: Path) -> None:
    def write(folder: Path) -> None:
        adapter(folder, weights=b"half of it")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        publish(stage, write, facts())
    assert weights(stage) == WEIGHTS
    publish(stage, writer(weights=b"whole"), facts())
    assert weights(stage) == b"whole"
    assert [p.name for p in stage.iterdir()] == ["output"]


def test_a_first_write_that_fails_publishes_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        adapter(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "sft", write, facts())
    assert handoff.read_manifest(tmp_path / "sft") is None


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("operation", ["rename", "replace", "fsync"])
def test_a_cut_at_any_system_call_leaves_old_or_new(
    stage: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: int
) -> None:
    """As if the process was killed at the n-th rename, replace or fsync."""
    real, calls = getattr(os, operation), 0

    def cut(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(os, operation, cut)
    try:
        publish(stage, writer(weights=b"new"), facts())
    except KeyboardInterrupt:
        pass
    finally:
        monkeypatch.setattr(os, operation, real)
    assert weights(stage) in (WEIGHTS, b"new")
    publish(stage, writer(weights=b"newer"), facts())
    assert weights(stage) == b"newer"
    assert [p.name for p in stage.iterdir()] == ["output"]


def test_a_replacement_cut_between_its_renames_is_undone(stage: Path) -> None:
    os.rename(stage / "output", stage / "output.previous")
    assert weights(stage) == WEIGHTS
    publish(stage, writer(weights=b"new"), facts())
    assert weights(stage) == b"new"
    assert [p.name for p in stage.iterdir()] == ["output"]


def test_a_replacement_cut_after_its_renames_is_finished(stage: Path) -> None:
    shutil.copytree(stage / "output", stage / "output.previous")
    (stage / "output.previous" / "tokenizer.json").write_text("old", encoding="utf-8")
    assert weights(stage) == WEIGHTS
    publish(stage, writer(weights=b"new"), facts())
    assert [p.name for p in stage.iterdir()] == ["output"]


def test_a_reader_between_the_renames_does_not_stop_the_writer(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`relay status` holds no lock, so it may look while a stage replaces its output."""
    real = os.rename

    def rename_and_look(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "output.previous":
            monkeypatch.setattr(os, "rename", real)
            handoff.read_manifest(stage)

    monkeypatch.setattr(os, "rename", rename_and_look)
    publish(stage, writer(weights=b"new"), facts())
    assert weights(stage) == b"new"


# Damage.


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(output: Path) -> None:
        (output / name).write_bytes(edit((output / name).read_bytes()))

    return act


def edit_manifest(**changed: Any) -> Callable[[Path], None]:
    def edit(raw: bytes) -> bytes:
        manifest = json.loads(raw)
        for dotted, value in changed.items():
            *path, last = dotted.split("__")
            node = manifest
            for key in path:
                node = node[key]
            if value is None:
                del node[last]
            else:
                node[last] = value
        return json.dumps(manifest, indent=2, sort_keys=True).encode()

    return change("manifest.json", edit)


def flip(raw: bytes) -> bytes:
    return raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:]


WEIGHT_FILE = "adapter_model.safetensors"
Act = Callable[[Path], Any]
ALTERED_MANIFEST = r"manifest\.json: this manifest was altered or cut short"
DAMAGE: dict[str, tuple[Act, str]] = {
    "cut": (
        change(WEIGHT_FILE, lambda raw: raw[:-1]),
        r"adapter_model\.safetensors: altered: sha256 \w{16}…\n  expected sha256 \w{16}…",
    ),
    "emptied": (change(WEIGHT_FILE, lambda raw: b""), r"adapter_model\.safetensors: altered"),
    "one bit": (change(WEIGHT_FILE, flip), r"adapter_model\.safetensors: altered"),
    "in a folder": (change("templates/chat.jinja", lambda raw: raw + b" "), r"templates/chat\.jinja: altered"),
    "config": (change("adapter_config.json", lambda raw: raw.replace(b"8", b"9")), r"adapter_config\.json: altered"),
    "deleted": (
        lambda output: (output / "tokenizer.json").unlink(),
        r"tokenizer\.json: missing\n  expected sha256 \w{16}…",
    ),
    "deleted folder": (lambda output: shutil.rmtree(output / "templates"), r"templates/chat\.jinja: missing"),
    "added": (
        lambda output: (output / "extra.bin").write_bytes(b""),
        r"extra\.bin: not in the manifest\n  expected no such file",
    ),
    "manifest cut": (change("manifest.json", lambda raw: raw[: len(raw) // 2]), ALTERED_MANIFEST),
    "manifest not text": (change("manifest.json", lambda raw: b"\xff" + raw), ALTERED_MANIFEST),
    "manifest a list": (change("manifest.json", lambda raw: b"[]"), ALTERED_MANIFEST),
    "manifest without files": (edit_manifest(files=None), ALTERED_MANIFEST),
    "manifest deleted": (lambda output: (output / "manifest.json").unlink(), "manifest.json: missing"),
    "schema": (edit_manifest(schema=99), rf"manifest\.json: schema 99\n  expected schema 1|{ALTERED_MANIFEST}"),
    "content hash": (
        edit_manifest(content_hash="0" * 64),
        rf"manifest\.json: its content hash does not fit|{ALTERED_MANIFEST}",
    ),
    "a file's hash": (
        edit_manifest(**{"files__tokenizer.json": "0" * 64}),
        rf"tokenizer\.json: altered: .*\n  expected sha256 0000000000000000…|{ALTERED_MANIFEST}",
    ),
    "a file's name": (
        edit_manifest(**{"files__tokenizer.json": None}),
        rf"tokenizer\.json: not in the manifest|{ALTERED_MANIFEST}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(stage: Path, damage: str) -> None:
    act, message = DAMAGE[damage]
    act(stage / "output")
    with pytest.raises(UserError, match=message) as error:
        open_baton(stage)
    assert "--from sft" in str(error.value)


ALTERED: dict[str, Act] = {
    "a second manifest.json": lambda output: (output / "templates" / "manifest.json").write_bytes(b"{}"),
    "no schema": edit_manifest(schema=None),
    "a metric": edit_manifest(metrics__loss=0.5),
    "the base": edit_manifest(base__content_hash="c" * 64),
    "a parent": edit_manifest(parents={"reward": "0" * 64}),
    "a recipe key": edit_manifest(inputs__block__lr=0.2),
}


@pytest.mark.parametrize("part", ALTERED)
def test_no_part_of_the_manifest_can_be_altered(stage: Path, part: str) -> None:
    ALTERED[part](stage / "output")
    with pytest.raises(UserError):
        open_baton(stage)


def test_one_flipped_bit_anywhere_in_the_manifest_is_refused(stage: Path) -> None:
    path = stage / "output" / "manifest.json"
    raw = path.read_bytes()
    passed = []
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << place % 7)]) + raw[place + 1 :])
        try:
            open_baton(stage)
            passed.append(place)
        except UserError:
            pass
    assert passed == []


# Hashes.


def test_content_hash_is_of_contents_alone(tmp_path: Path) -> None:
    """Not of where the base lies, where the run lies, when it was written or what the manifest says besides."""
    first = publish(tmp_path / "a" / "sft", writer(), facts())
    second = publish(tmp_path / "b" / "sft", writer(base="/another/disk/base"), facts(stage="renamed", metrics={}))
    for file in second.path.rglob("*"):
        os.utime(file, (0, 0))
    assert first.content_hash == open_baton(tmp_path / "b" / "sft").content_hash
    assert first.manifest["files"]["adapter_config.json"] != second.manifest["files"]["adapter_config.json"]


@pytest.mark.parametrize("changed", [{"weights": b"other"}, {"tokenizer": "other"}])
def test_content_hash_changes_with_contents(stage: Path, changed: dict[str, Any]) -> None:
    before = open_baton(stage).content_hash
    assert publish(stage, writer(**changed), facts()).content_hash != before


def test_content_hash_changes_with_an_adapter_setting_or_a_name(stage: Path) -> None:
    def wider(folder: Path) -> None:
        adapter(folder)
        (folder / "adapter_config.json").write_bytes(b'{"base_model_name_or_path": "models/base", "r": 16}')

    def renamed(folder: Path) -> None:
        adapter(folder)
        os.rename(folder / "tokenizer.json", folder / "tokenizer.model")

    hashes = {open_baton(stage).content_hash}
    hashes |= {publish(stage, write, facts()).content_hash for write in (wider, renamed)}
    assert len(hashes) == 3


def test_model_hash_is_of_weights_and_config(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "model.safetensors").write_bytes(WEIGHTS)
    (first / "config.json").write_text("{}", encoding="utf-8")
    shutil.copytree(first, second)
    (second / "README.md").write_text("notes", encoding="utf-8")
    before = handoff.model_hash(str(first))
    assert handoff.model_hash(str(second)) == before
    (second / "config.json").write_text('{"layers": 2}', encoding="utf-8")
    assert handoff.model_hash(str(second)) != before
    (first / "model.safetensors").write_bytes(flip(WEIGHTS))
    assert handoff.model_hash(str(first)) != before
    (first / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in that folder"):
        handoff.model_hash(str(first))


# Checks between stages.


def test_an_adapter_on_another_base_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(WEIGHTS)
    recorded = {"model": str(base), "revision": None, "content_hash": handoff.model_hash(str(base))}
    baton = publish(tmp_path / "sft", writer(), facts(base=recorded))
    baton.check_base()
    (base / "model.safetensors").write_bytes(WEIGHTS + b"!")
    with pytest.raises(UserError) as error:
        baton.check_base()
    found = handoff.model_hash(str(base))
    assert str(error.value).splitlines() == [
        f"{tmp_path}/sft/output: this adapter was trained on another base: {base} now has content {found[:16]}…",
        f"  expected content {recorded['content_hash'][:16]}…",
        "  fix: restore that base, or run the stage again: relay run RECIPE --from sft",
    ]


def test_a_full_model_has_no_base_to_check(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(WEIGHTS)

    publish(tmp_path / "sft", write, facts()).check_base()


def test_different_tokenizers_are_refused(stage: Path, tmp_path: Path) -> None:
    ours = open_baton(stage)

    def other(**changed: Any) -> Baton:
        return publish(tmp_path / "reward", writer(**changed), facts("reward"))

    handoff.check_same_tokenizer(ours, other(weights=b"different weights"))
    with pytest.raises(UserError) as error:
        handoff.check_same_tokenizer(ours, other(tokenizer="other tokens"))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("tokenizer of sft and reward: tokenizer.json differs: ")
    assert lines[1:] == [
        "  expected one tokenizer through the chain",
        "  fix: train both stages from bases with the same tokenizer, `chat_template` and `add_tokens`",
    ]

    def templated(folder: Path) -> None:
        adapter(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")

    with pytest.raises(UserError, match=r"chat_template\.jinja differs"):
        handoff.check_same_tokenizer(ours, publish(tmp_path / "reward", templated, facts("reward")))

    def without(folder: Path) -> None:
        adapter(folder)
        (folder / "tokenizer.json").unlink()

    with pytest.raises(UserError, match=r"tokenizer\.json differs"):
        handoff.check_same_tokenizer(ours, publish(tmp_path / "reward", without, facts("reward")))


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    handoff.write_json(path, {"b": 1, "a": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "a": 2,\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        handoff.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 2, "b": 1}
