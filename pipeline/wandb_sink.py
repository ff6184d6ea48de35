"""Weights & Biases: one run per stage, grouped by the run's folder, and the chain's outputs as artifacts with their lineage."""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.config.schema import Wandb
from pipeline.handoff import ADAPTER_CONFIG, MANIFEST
from pipeline.sinks import Published, cell

TYPES = {"evaluate": "evaluation", "prepare": "dataset", "selection": "dataset"}
"""Types of the artifacts of stages that publish no model."""

BEST = {"loss": "min", "eval_loss": "min", "accuracy": "max", "eval/score": "max", "objective/scores": "max"}
"""What a run's summary shows of a metric besides its last value."""

ID = "wandb_run_id"


class WandbSink:
    """Raises whatever W&B does; its caller guards it."""

    def __init__(
        self,
        stage_dir: Path,
        settings: Wandb,
        *,
        recipe: str,
        stage: str,
        kind: str,
        config: dict[str, Any],
        resume_step: int,
    ) -> None:
        import wandb

        self._wandb, self._settings = wandb, settings
        chain = stage_dir.resolve().parent.name
        identity = stage_dir / ID
        again = resume_step > 0 and identity.exists()
        run_id = identity.read_text(encoding="utf-8") if again else secrets.token_hex(4)
        identity.write_text(run_id, encoding="utf-8")
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            group=chain,
            job_type=kind,
            name=f"{chain}/{stage}",
            tags=[recipe],
            id=run_id,
            resume="allow",
            config={"recipe": recipe, "stage": stage, "kind": kind, **config},
            dir=str(stage_dir),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
        for name, best in BEST.items():
            self._run.define_metric(name, summary=f"{best},last")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._run.log({"samples": self._table([{"step": step, **row} for row in rows])}, step=step)

    def _table(self, rows: list[dict[str, Any]]) -> Any:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        return self._wandb.Table(columns=columns, data=[[cell(row.get(name)) for name in columns] for row in rows])

    def published(self, work: Published) -> None:
        """The stage's output as an artifact, made from its parents' and its data's."""
        for name, rows in work.tables.items():
            self._run.log({name: self._table(rows)})
        for path, manifest in work.parents:
            self._use(self._artifact(path, manifest))
        for source in work.manifest["data"]:
            self._use(self._data(source))
        self._run.log_artifact(self._artifact(work.path, work.manifest))

    def _use(self, artifact: Any) -> None:
        # As `use_artifact` does with one of the same content; that refuses to in offline mode, and waits for the server.
        self._run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)

    def _artifact(self, path: Path, manifest: dict[str, Any]) -> Any:
        """The same name and content, hence the same version, whichever stage asks."""
        keys = ("kind", "content_hash", "base", "adapter", "parents", "seed", "world_size", "zero_stage", "versions")
        run = path.resolve().parent.parent.name  # a parent's may be another
        artifact = self._wandb.Artifact(
            re.sub(r"[^\w.-]", "-", f"{run}-{manifest['stage']}", flags=re.ASCII),  # as W&B wants names
            type=TYPES.get(manifest["kind"], "model"),
            metadata={**{key: manifest[key] for key in keys}, "metrics": manifest["metrics"]},
        )
        small = (path / ADAPTER_CONFIG).is_file() or manifest["kind"] in TYPES
        if self._settings.artifacts == "all" or (self._settings.artifacts == "adapters" and small):
            # Offline, W&B keeps a copy: the folder may hold a later output when it is sent.
            artifact.add_dir(str(path), policy="mutable" if self._run.offline else "immutable")
        else:
            artifact.add_file(str(path / MANIFEST))
            artifact.add_reference(path.resolve().as_uri(), name="output", checksum=False)
        return artifact

    def _data(self, source: dict[str, Any]) -> Any:
        facts = {key: value for key, value in source.items() if not isinstance(value, dict)}
        artifact = self._wandb.Artifact(f"data-{str(source['sha256'])[:12]}", type="dataset", metadata=facts)
        with artifact.new_file("source.json") as file:
            file.write(cell({"path": source["path"], "sha256": source["sha256"]}))
        return artifact

    def close(self) -> None:
        self._run.finish()


def abandon() -> None:
    """End W&B's own process, which this one would wait for when it exits. What it wrote so far stays."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "wandb-core" in child.name():
                child.kill()
