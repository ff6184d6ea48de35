"""All three stages for a set of {LoRA, QLoRA, full} x ZeRO {0..3} x {1, 2} ranks in which every pair of choices occurs.

The whole matrix is `scripts/matrix.py`; its last result is docs/results/matrix.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.session import Ranks

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter__method": "lora"},
    "qlora": {"adapter__method": "lora", "base__quantization": "nf4", "base__dtype": "bf16"},
    "full": {"adapter": {"method": "full"}},
}
SUBSET = [
    ("lora", 0, 1),
    ("lora", 1, 2),
    ("lora", 2, 1),
    ("lora", 3, 2),
    ("qlora", 0, 2),
    ("qlora", 1, 1),
    ("qlora", 2, 2),
    ("qlora", 3, 1),
    ("full", 0, 1),
    ("full", 1, 2),
    ("full", 2, 2),
    ("full", 3, 1),
]
TOLERANCE = {"lora": 2e-5, "full": 2e-5, "qlora": 0.05}
"""QLoRA computes in bf16, where one rounding of a logit of this size is about 0.03."""


@pytest.mark.fast
def test_subset_covers_every_pair() -> None:
    axes = (METHODS, range(4), (1, 2))
    for first, second in itertools.combinations(range(3), 2):
        seen = {(case[first], case[second]) for case in SUBSET}
        assert seen == set(itertools.product(axes[first], axes[second]))


@pytest.mark.parametrize(("method", "zero", "world"), sorted(SUBSET, key=lambda case: case[2]))
def test_chain(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, method: str, zero: int, world: int
) -> None:
    steps = {f"stages__{stage}__steps": 2 for stage in ("sft", "reward", "ppo")}
    recipe = str(
        tiny.recipe(tmp_path / "tiny.yaml", tiny_llama, deepspeed__config=f"zero{zero}", **steps, **METHODS[method])
    )
    run = str(tmp_path / "run")
    hashes = ranks(world).call("tests.support.stages:chain", recipe=recipe, run_dir=run)
    assert all(h == hashes[0] for h in hashes)
    assert set(hashes[0]) == {"sft", "reward", "ppo"}
    for difference in ranks(world).call("tests.distributed.cases:opens_plainly", recipe=recipe, run_dir=run):
        assert max(difference.values()) <= TOLERANCE[method], difference
