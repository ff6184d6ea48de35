"""The baton: what a finished stage hands to the next. Published whole or not at all, hashed, and verified when opened.

`<run>/<stage>/output/` holds plain ecosystem files (a PEFT adapter or a `save_pretrained` model, tokenizer, generation
config) and `manifest.json`, which records where it came from and a sha256 per file. Times and hosts are beside it, in
`<run>/<stage>/session.json`, so that the same work gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, digest
from pipeline.config.schema import Adapter
from pipeline.data.read import file_hash
from pipeline.errors import UserError

SCHEMA = 1
MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
OUTPUT = "output"
SEAL = "manifest_hash"
WEIGHTS = (".safetensors", ".bin", ".index.json")
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
"""Endings of files that run code when they are read; no output holds such a file."""


@dataclass(frozen=True)
class Baton:
    """A verified output folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def content_hash(self) -> str:
        return str(self.manifest["content_hash"])

    @property
    def is_adapter(self) -> bool:
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def adapter(self) -> Adapter:
        """The recipe's adapter block that the output was trained with."""
        return Adapter.model_validate(self.manifest["inputs"]["block"]["adapter"])

    @property
    def base(self) -> str:
        """Where the weights below the adapter are (a folder or a hub id); the output itself when it is a full model."""
        return str(self.manifest["base"]["model"]) if self.is_adapter else str(self.path)

    def check_base(self) -> None:
        """Refuse an adapter whose base holds other weights now than the ones it was trained on."""
        record = self.manifest["base"]
        expected = record["content_hash"]
        if self.is_adapter and (found := model_hash(record["model"], record["revision"])) != expected:
            raise UserError(
                str(self.path),
                f"this adapter was trained on another base: {record['model']} now has content {found[:16]}…",
                expected=f"content {expected[:16]}…",
                fix=f"restore that base, or {_rebuild(self.path.parent)}",
            )


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but the manifest, by relative path, sorted."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in found}


def content_hash(folder: Path, hashes: dict[str, str]) -> str:
    """One hash of what the files say. An adapter's record of where its base lies on this disk does not count."""
    portable = dict(hashes)
    if ADAPTER_CONFIG in portable:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config.pop("base_model_name_or_path", None)
        portable[ADAPTER_CONFIG] = digest(config)
    return digest(portable)


def model_hash(model: str, revision: str | None = None) -> str:
    """Content hash of a base model: its weight files, config.json and code. `model` is a folder or a hub id."""
    folder = model_folder(model, revision)
    found = sorted(p for p in folder.iterdir() if p.name.endswith((*WEIGHTS, ".py")) or p.name == "config.json")
    if not any(p.name.endswith(WEIGHTS) for p in found):
        raise UserError(
            f"base {model}",
            "no weights in that folder",
            expected="*.safetensors and config.json",
            fix="check base.model; a folder is relative to the recipe file",
        )
    return _hash_once(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in found))


def outside_hash(model: str, revision: str | None = None) -> str:
    """Content hash of a model that no stage made: of a full model, or of a PEFT adapter and what it stands on."""
    folder = model_folder(model, revision)
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return model_hash(model, revision)
    config = json.loads(file.read_text(encoding="utf-8"))
    below = model_hash(config.pop("base_model_name_or_path"), config.get("revision"))
    return digest({"adapter": model_hash(model, revision), "config": config, "base": below})


def model_folder(model: str, revision: str | None = None) -> Path:
    """Where a base's files are: a folder, or a hub id's files in the cache, fetched if they are not there."""
    return Path(model) if Path(model).is_dir() else _snapshot(model, revision)


@lru_cache(maxsize=64)
def _hash_once(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One hash over names and contents; a process reads the same unchanged weights only once."""
    return digest({path.name: file_hash(path) for path, _, _ in files})


def _snapshot(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        # Older models, such as OPT, are on the hub as .bin alone; transformers reads those by torch.load(weights_only=True).
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"base {model}",
            f"neither a folder here nor to be had from the hub: {reason}",
            fix="check base.model and the network, or download it and give the folder",
        ) from None


def publish(stage_dir: Path, write: Callable[[Path], None], facts: dict[str, Any]) -> Baton:
    """Write `<stage_dir>/output` whole or not at all: beside, synced, hashed, manifest last, renamed.

    `write` fills an empty folder; `facts` becomes the manifest, with `schema`, `files` and `content_hash` added. Raises
    RuntimeError for a file in `PICKLES`: the stage then publishes nothing.
    """
    output, fresh, previous = stage_dir / OUTPUT, stage_dir / "output.writing", stage_dir / "output.previous"
    recover(stage_dir)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    for file in fresh.rglob("*"):
        if file.suffix in PICKLES:
            raise RuntimeError(f"{file}: an output holds safetensors and text, no pickles")
        if file.is_file():
            sync(file)
    hashes = file_hashes(fresh)
    manifest = {"schema": SCHEMA, **facts, "content_hash": content_hash(fresh, hashes), "files": hashes}
    write_json(fresh / MANIFEST, sealed(manifest))
    sync(fresh)
    if output.exists():
        os.rename(output, previous)
    os.rename(fresh, output)
    sync(stage_dir)
    shutil.rmtree(previous, ignore_errors=True)
    return Baton(output, manifest)


def recover(stage_dir: Path) -> None:
    """Undo a replacement that was cut between its two renames."""
    output, previous = stage_dir / OUTPUT, stage_dir / "output.previous"
    if previous.exists():
        if output.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, output)


def current(stage_dir: Path) -> Path:
    """Where the published output is: a replacement that was cut, or is under way, leaves it in `output.previous`."""
    output, previous = stage_dir / OUTPUT, stage_dir / "output.previous"
    return previous if previous.exists() and not output.exists() else output


def published(stage_dir: Path) -> tuple[int, int] | None:
    """Which publication lies in a stage's folder: another after each `publish`, None where there is none."""
    try:
        found = (current(stage_dir) / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_manifest(stage_dir: Path) -> dict[str, Any] | None:
    """The manifest of a published stage, unverified; None when nothing is published."""
    path = current(stage_dir) / MANIFEST
    if not path.parent.exists():
        return None
    if not path.is_file():
        raise UserError(str(path), "missing, and the other files of the output are there", fix=_rebuild(stage_dir))
    manifest = unsealed(path)
    if manifest is None:
        raise UserError(str(path), "this manifest was altered or cut short", fix=_rebuild(stage_dir))
    return manifest


def open_baton(stage_dir: Path) -> Baton:
    """The verified output of a stage. Raises UserError naming the first file that is missing, added or altered."""
    manifest = read_manifest(stage_dir)
    output = current(stage_dir)
    if manifest is None:
        raise UserError(
            f"stage {stage_dir.name}",
            f"nothing is published in {output}",
            expected="a finished stage",
            fix=_rebuild(stage_dir),
        )
    if manifest["schema"] != SCHEMA:
        raise UserError(
            str(output / MANIFEST), f"schema {manifest['schema']}", expected=f"schema {SCHEMA}", fix=_rebuild(stage_dir)
        )
    expected, found = manifest["files"], file_hashes(output)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            state = (
                "missing"
                if name not in found
                else "not in the manifest"
                if name not in expected
                else (f"altered: sha256 {found[name][:16]}…")
            )
            raise UserError(
                str(output / name),
                state,
                expected=f"sha256 {expected[name][:16]}…" if name in expected else "no such file",
                fix=f"restore the file, or {_rebuild(stage_dir)}",
            )
    if content_hash(output, found) != manifest["content_hash"]:
        raise UserError(str(output / MANIFEST), "its content hash does not fit its files", fix=_rebuild(stage_dir))
    return Baton(output, manifest)


def elsewhere(recipe: Recipe, run: str, stage: str) -> Baton | None:
    """What a stage of another run published, by its manifest alone; None where it has not. `run` is that run's folder, as the
    recipe means it."""
    folder = Path(recipe.local(run)) / stage
    manifest = read_manifest(folder)
    return None if manifest is None else Baton(folder / OUTPUT, manifest)


def check_same_tokenizer(first: Baton, second: Baton) -> None:
    """Refuse two stages whose tokenizers or chat templates differ: what one learned would look otherwise to the other."""
    names = [
        name
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "chat_template.jinja")
        if name in first.manifest["files"] or name in second.manifest["files"]
    ]
    for name in names:
        ours, theirs = first.manifest["files"].get(name), second.manifest["files"].get(name)
        if ours != theirs:
            raise UserError(
                f"tokenizer of {first.manifest['stage']} and {second.manifest['stage']}",
                f"{name} differs: {str(ours)[:16]}… and {str(theirs)[:16]}…",
                expected="one tokenizer through the chain",
                fix="train both stages from bases with the same tokenizer, `chat_template` and `add_tokens`",
            )


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with its own hash, by which a reader knows it whole."""
    return {**value, SEAL: digest(value)}


def unsealed(path: Path) -> dict[str, Any] | None:
    """What a sealed JSON file says; None when it is not there, was altered or cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) and value.pop(SEAL, None) == digest(value) else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    replace(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a disk that is full, leaves the old content or the new one whole."""
    fresh = path.with_name(path.name + ".writing")
    fresh.write_bytes(content)
    sync(fresh)
    os.replace(fresh, path)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rebuild(stage_dir: Path) -> str:
    return f"run the stage again: relay run RECIPE --from {stage_dir.name}"
