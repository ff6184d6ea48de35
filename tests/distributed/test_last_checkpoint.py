"""Killed between the last checkpoint and the publish: the same command publishes the same bytes, with no step too many."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
EARLY = {
    "stages__sft__lr": 5.0,
    "stages__ppo__lr": 5.0,
    "stages__ppo__kl": {"coef": 0.0},
    **{f"stages__{s}__eval_every": 1 for s in ("sft", "ppo")},
    **{f"stages__{s}__early_stopping": 1 for s in ("sft", "ppo")},
    **{f"stages__{s}__publish": "best" for s in ("sft", "ppo")},
    "stages__sft__save_every": None,
    "stages__sft__steps": 8,
    "stages__ppo__steps": 8,
}


@pytest.mark.parametrize("changes", [{}, EARLY], ids=["to the end", "stopped early"])
def test_publishing_again_from_the_last_checkpoint(ranks: Get, tiny_llama: Path, tmp_path: Path, changes: dict) -> None:
    # 3 optimizer steps are not a whole pass over the rows, as is usual.
    changes = changes or {f"stages__{stage}__steps": 3 for stage in ("sft", "reward", "ppo")}
    recipe, run = tiny.recipe(tmp_path / "r.yaml", tiny_llama, **changes), tmp_path / "run"
    first = ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(run))[0]
    for stage in first:
        kept = {p.name: p.read_bytes() for p in (run / stage / "output").iterdir()}
        shutil.rmtree(run / stage / "output")
        ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage=stage, run_dir=str(run))
        assert {p.name: p.read_bytes() for p in (run / stage / "output").iterdir()} == kept, stage


def test_few_held_out_rows(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """Fewer held-out rows than a batch are evaluated all the same."""
    recipe = tiny.recipe(
        tmp_path / "r.yaml", tiny_llama, data__holdout=0.003, stages__sft__batch=16, stages__sft__micro_batch=8
    )
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(tmp_path / "run"), until="sft")


def test_qlora_parent_is_merged_dequantised(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """PPO with another rank on a QLoRA SFT: the merged base reads as the 4-bit base with its adapter does."""
    recipe = tiny.recipe(
        tmp_path / "r.yaml", tiny_llama, base__quantization="nf4", base__dtype="bf16", stages__ppo__adapter={"r": 2}
    )
    run = str(tmp_path / "run")
    ranks(1).call("tests.support.stages:chain", recipe=str(recipe), run_dir=run, until="reward")
    found = ranks(1).call("tests.distributed.cases:merged_like_adapter", recipe=str(recipe), run_dir=run)[0]
    assert found["difference"] <= 0.05, "bf16 rounding alone"
    assert found["to_the_original"] > 0.1, "the original weights would have read otherwise"
