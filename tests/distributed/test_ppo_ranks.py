"""PPO's update does not depend on how many ranks or which ZeRO stage computed it; bf16 keeps float32 masters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.session import Ranks

SGD = [
    "stages.ppo.optimizer=sgd",
    "stages.ppo.lr=50.0",
    "stages.ppo.critic.lr=5.0",
    "stages.ppo.max_grad_norm=0",
    "stages.ppo.warmup=0",
    "stages.ppo.minibatches=1",
    "stages.ppo.lr_schedule=constant",
]
Get = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def published(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A recipe whose SFT and reward stages are published: (recipe, run directory)."""
    folder = tmp_path_factory.mktemp("parity")
    recipe = str(tiny.recipe(folder / "tiny.yaml", tiny_llama))
    run = str(folder / "run")
    ranks(2).call("tests.support.stages:chain", recipe=recipe, run_dir=run, until="reward")
    return recipe, run


@pytest.fixture(scope="module")
def single(ranks: Get, published: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One update on one rank without ZeRO: what every other layout must give."""
    target = tmp_path_factory.mktemp("single") / "one.pt"
    ranks(1).call(
        "tests.distributed.cases:one_update",
        recipe=published[0],
        run_dir=published[1],
        overrides=[*SGD, "deepspeed.config=zero0"],
        target=str(target),
    )
    return torch.load(target, weights_only=False)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_equal_one(ranks: Get, published: tuple[str, str], single: dict, zero: str, tmp_path: Path) -> None:
    """Same tokens; the SGD step, which is the gradient times a constant, within 1e-5 relative, and large enough to show."""
    ranks(2).call(
        "tests.distributed.cases:one_update",
        recipe=published[0],
        run_dir=published[1],
        overrides=[*SGD, f"deepspeed.config={zero}"],
        target=str(tmp_path / "two.pt"),
    )
    two = torch.load(tmp_path / "two.pt", weights_only=False)
    assert two["tokens"] == single["tokens"]
    assert single["change"].keys() == two["change"].keys()
    for role in (".policy.weight", ".critic.weight"):
        ours, theirs = (
            torch.cat([c.flatten() for n, c in sorted(side["change"].items()) if n.endswith(role)])
            for side in (two, single)
        )
        assert theirs.abs().max() > 1e-2, "the update is too small to prove anything"
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, role
    weights = {
        side: torch.cat([w.flatten() for _, w in sorted(d["after"].items())])
        for side, d in (("two", two), ("one", single))
    }
    assert (weights["two"] - weights["one"]).norm() / weights["one"].norm() < 1e-5


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_bf16_keeps_float32_masters(ranks: Get, published: tuple[str, str], zero: str) -> None:
    """Master weights and Adam states are float32, and updates far below bf16's resolution add up in the masters."""
    overrides = [
        "base.dtype=bf16",
        f"deepspeed.config={zero}",
        "stages.ppo.lr=1.0e-6",
        "stages.ppo.warmup=0",
        "stages.ppo.lr_schedule=constant",
    ]
    found = ranks(2).call(
        "tests.distributed.cases:master_weights",
        recipe=published[0],
        run_dir=published[1],
        overrides=overrides,
        updates=3,
    )[0]
    assert found["weight"] == "torch.bfloat16"
    assert found["master"] == "torch.float32"
    assert found["states"] == {"exp_avg": "torch.float32", "exp_avg_sq": "torch.float32"}
    # Six Adam steps (two minibatches, three times) of about 1e-6 each: they add up in the masters. A bf16 weight of this
    # size could not hold even their sum: its spacing is 2**-8 of its magnitude.
    assert 4e-6 < found["moved"] < 8e-6
    assert found["moved"] < found["size"] * 2.0**-9


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_critic_loss_does_not_touch_the_policy(ranks: Get, published: tuple[str, str], zero: str) -> None:
    """A critic loss multiplied by 100 leaves the policy's update exactly as it was: norms are per role."""
    overrides = [f"deepspeed.config={zero}", "stages.ppo.warmup=0", "stages.ppo.max_grad_norm=0.01"]
    plain, scaled = (
        ranks(2).call(
            "tests.distributed.cases:role_scaling",
            recipe=published[0],
            run_dir=published[1],
            overrides=overrides,
            factor=factor,
        )[0]
        for factor in (1.0, 100.0)
    )
    assert scaled["norms"][1] == pytest.approx(100 * plain["norms"][1], rel=1e-3)
    assert scaled["policy"] == plain["policy"]


def test_no_shared_memory_outlives_the_ranks(ranks: Get) -> None:
    """DeepSpeed's buffers have no name any more once the ranks run: a kill leaves nothing of them behind."""
    assert ranks(2).call("tests.distributed.cases:shared_buffers", seed=0) == [[], []]
