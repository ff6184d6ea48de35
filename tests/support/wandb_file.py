"""W&B's own offline files, read back: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as proto

HEADER, BLOCK = 7, 32768
FULL, FIRST, LAST = 1, 2, 4


def messages(path: Path) -> Iterator[bytes]:
    """The log's records; a tail that is still being written is left out."""
    raw = path.read_bytes()
    assert raw[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + 7 <= len(raw):
        room = BLOCK - at % BLOCK
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        piece = raw[at + 7 : at + 7 + length]
        if len(piece) < length:
            return
        at += 7 + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield parts


class Offline:
    """What an offline run recorded, by kind of record."""

    def __init__(self, *paths: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.logged: list[Any] = []
        self.used: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.ended = 0
        for path in paths:
            for message in messages(path):
                record = proto.Record()
                record.ParseFromString(message)
                self._add(record)

    def _add(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            self._configure(record.run.config.update)
        elif kind == "config":
            self._configure(record.config.update)
        elif kind == "history":
            items = record.history.item
            self.rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif kind == "metric":
            self.metrics[record.metric.name] = record.metric.summary
        elif kind == "artifact":
            (self.used if record.artifact.use_after_commit else self.logged).append(record.artifact)
        elif kind == "exit":
            self.ended += 1

    def _configure(self, updates: Any) -> None:
        for update in updates:
            self.config[update.key or update.nested_key[0]] = json.loads(update.value_json)


def offline(stage_dir: Path, patience: float = 30.0) -> Offline:
    """All offline runs of a stage, in the order in which they began, once W&B's own process has written them to their ends."""
    limit = time.monotonic() + patience
    while True:
        files = sorted(stage_dir.glob("wandb/offline-run-*/run-*.wandb"))
        found = Offline(*(file for file in files if file.stat().st_size))
        if files and found.ended == len(files):
            return found
        assert time.monotonic() < limit, f"{found.ended} of {len(files)} runs were ended"
        time.sleep(0.05)
