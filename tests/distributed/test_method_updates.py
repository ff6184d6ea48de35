"""One update of PPO for every method that it takes, on every family: the program's own data, roles, engine, rollout and losses.

Of chains, ranks and ZeRO stages are test_methods.py and scripts/matrix.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.methods import METHODS
from tests.distributed.method_cases import FUNCTION
from tests.support import tiny
from tests.support.methods import FAMILIES, changes, fits
from tests.support.session import Ranks

PPO = {
    "policy": "base",
    "reward": [{"function": FUNCTION}],
    "critic": {"init": "policy"},
    "warmup": 0,
    "whiten": False,
    "steps": 4,
    "minibatches": 1,
    "epochs": 1,
    "sampling": {"max_prompt_length": 64, "max_response_length": 6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update(ranks: Callable[[int], Ranks], tmp_path: Path, family: str) -> None:
    """At the first minibatch the policy is the one that sampled: its ratio is 1, and the losses are those of PPO's formulas
    with it. Everything trained moves, nothing else does, and all roles are on one copy of the base."""
    methods = [method for method in METHODS if METHODS[method].shared and fits(method, family)]
    base = tiny.model(tmp_path / "base", family, **tiny.WIDE[family])
    recipes = {}
    for method in methods:
        laid = {**changes(method, 0), **{f"stages__ppo__{key}": value for key, value in PPO.items()}}
        recipes[method] = str(tiny.recipe(tmp_path / f"{method}.yaml", base, **laid))
    target = tmp_path / "made.pt"
    asked = {"recipes": recipes, "folder": str(tmp_path / "runs"), "target": str(target)}
    found = ranks(1).call("tests.distributed.method_cases:ppo_updates", **asked)[0]
    for method, made in torch.load(target).items():
        stats, told = found[method]["stats"], f"{method}: {found[method]}"
        advantages, mask, values, returns = (made[name].double().numpy() for name in made)
        tokens = mask.sum()
        # Half the squared log-ratio, summed over tokens, bounds that of each.
        assert np.sqrt(2 * stats["policy/approxkl_avg"] * tokens) < 1e-4, told
        assert stats["val/ratio"] == pytest.approx(1.0, abs=1e-4), told
        assert stats["policy/clipfrac_avg"] == 0.0, told
        assert stats["loss/policy_avg"] == pytest.approx(-(advantages * mask).sum() / tokens, abs=1e-5), told
        error = 0.5 * (((values - returns) * mask) ** 2).sum() / tokens
        assert stats["loss/value_avg"] == pytest.approx(error, rel=1e-4), told
        assert np.abs(advantages).max() > 1e-2, told
        assert (found[method]["stayed"], found[method]["moved"]) == ([], []), told
        assert found[method]["frozen"] > 10, told
        assert found[method]["trunks"] == (3 if method == "full" else 1), told
    assert found.keys() == set(methods)
