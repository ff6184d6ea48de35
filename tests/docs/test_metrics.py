"""The page of metrics names whatever the three stages log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from tests.support import tiny
from tests.support.session import Ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_no_metric_is_left_out(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    steps = {f"stages__{stage}__steps": 2 for stage in ("sft", "reward", "ppo")}
    more = {f"stages__{stage}__eval_every": 1 for stage in ("sft", "reward", "ppo")}
    recipe = tiny.recipe(tmp_path / "tiny.yaml", tiny_llama, **steps, **more)
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(tmp_path / "run"))
    named = re.findall(r"`([^`]+)`", PAGE.read_text(encoding="utf-8"))
    patterns = [re.compile(re.escape(name).replace(r"<name>", ".+").replace("<source>", ".+")) for name in named]
    missing = set()
    for stage in ("sft", "reward", "ppo"):
        for line in (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines():
            for name in json.loads(line).keys() - {"step", "time"}:
                plain = name.removeprefix("eval_")
                if not any(pattern.fullmatch(plain) for pattern in patterns):
                    missing.add(f"{stage}: {name}")
    assert missing == set()
