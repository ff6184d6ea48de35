"""A stage and all that it was made from, as the run's manifests tell it; their licences, where those say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from pipeline.config.kinds import POLICIES
from pipeline.data.read import hub_fingerprint, is_hub_id
from pipeline.handoff import OUTPUT, Baton
from pipeline.published import manifest, stages

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Data:
    """One source of a stage: what the recipe calls it, how many of its rows went where, and the hash of its contents."""

    stage: str
    path: str
    counts: dict[str, int]
    sha256: str
    on_hub: bool


@dataclass(frozen=True)
class Lineage:
    """`chain` holds manifests by stage, what was read before what read it and the stage itself last. A parent that lies in
    another run, or was made anew since, is in `missing` by its hash."""

    chain: dict[str, dict[str, Any]]
    missing: dict[str, str]
    base: dict[str, Any]

    @property
    def stage(self) -> dict[str, Any]:
        return list(self.chain.values())[-1]

    @property
    def base_id(self) -> str | None:
        """The base's id on the hub; None for a folder."""
        return hub_id(self.base["model"])

    def data(self) -> list[Data]:
        return [source for name, found in self.chain.items() for source in _data(name, found)]


def of(folder: Path, baton: Baton) -> Lineage:
    """The lineage of a stage that `folder`, a run directory, published."""
    chain: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    here = stages(folder)

    def visit(found: dict[str, Any]) -> None:
        for name, wanted in found["parents"].items():
            parent = manifest(folder, name) if name in here else None
            if parent is None or parent["content_hash"] != wanted:
                missing[name] = wanted
            elif name not in chain:
                visit(parent)
        chain[found["stage"]] = found

    visit(baton.manifest)
    policies = [found for found in chain.values() if found["kind"] in POLICIES]
    bases = [found["base"] for found in [*policies, baton.manifest] if not _made_here(folder, found["base"]["model"])]
    return Lineage(chain, missing, bases[0] if bases else baton.manifest["base"])


def evaluations(folder: Path, baton: Baton) -> Iterator[tuple[dict[str, Any], Path]]:
    """(manifest, output folder) of each evaluate stage of the run that measured just this output."""
    for name in stages(folder):
        found = manifest(folder, name)
        if found["kind"] == "evaluate" and found["parents"].get(baton.manifest["stage"]) == baton.content_hash:
            yield found, folder / name / OUTPUT


def hub_id(model: str) -> str | None:
    """`model` where it is written like an id on the hub and is no folder here."""
    return None if Path(model).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) else model


class Licences:
    """What the cards of models and data sets say of their licences; `unknown` where nothing does.

    The hub is asked once for each; when it cannot be reached it is not asked again.
    """

    def __init__(self) -> None:
        self._reached = True

    def of_model(self, model: str, revision: str | None = None) -> str:
        """Of a base: of a folder by the README.md in it, else of an id on the hub."""
        from huggingface_hub import ModelCard

        if hub_id(model) is not None:
            return self._asked(lambda api: api.model_info(model, revision=revision, timeout=10))
        file = Path(model) / "README.md"
        try:
            return _listed(ModelCard.load(file).data.get("license")) if file.is_file() else UNKNOWN
        except (OSError, ValueError, YAMLError):
            return UNKNOWN

    def of_data(self, name: str) -> str:
        """Of a data set on the hub."""
        return self._asked(lambda api: api.dataset_info(name, timeout=10))

    def _asked(self, ask: Callable[[Any], Any]) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        if not self._reached:
            return UNKNOWN
        try:
            card = ask(HfApi()).card_data
        except HfHubHTTPError:  # no such model, or none that we may see
            return UNKNOWN
        except Exception:  # no network: the library raises what its parts raise
            self._reached = False
            return UNKNOWN
        return _listed(card.get("license")) if card else UNKNOWN


def _listed(said: Any) -> str:
    return ", ".join(str(one) for one in (said if isinstance(said, list) else [said]) if one) or UNKNOWN


def _made_here(folder: Path, model: str) -> bool:
    """Whether a base is what a stage of the run published or wrote out."""
    return Path(model).resolve().is_relative_to(folder.resolve())


def _data(stage: str, found: dict[str, Any]) -> Iterator[Data]:
    for source in found["data"]:
        path, told = source["path"], source["sha256"]
        counts = {key: value for key, value in source.items() if isinstance(value, int)}
        options = [(None, "train", None), *_options(found["inputs"]["block"], path)]
        on_hub = is_hub_id(path) and any(told == hub_fingerprint(path, *option) for option in options)
        yield Data(stage, path, counts, told, on_hub)


def _options(value: Any, path: str) -> Iterator[tuple[str | None, str, str | None]]:
    """Revision, split and subset of every source of a block that reads `path`."""
    if isinstance(value, dict):
        if value.get("path") == path and "split" in value:
            yield value.get("revision"), value["split"], value.get("subset")
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from _options(inner, path)
