"""LoRA+: the second factors' learning rate in TRL's stages and in PPO, and one clipping norm for a role all the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from pipeline import engine
from pipeline.adapters import lora_plus
from pipeline.config.schema import Adapter, Sft
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RATIO = 16.0


@pytest.mark.fast
def test_second_factors_are_apart() -> None:
    base = tiny.build("llama_small")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    block = Sft.model_validate(
        {"kind": "sft", "base": {"model": "m"}, "data": [{"path": "d"}], "lr": 1e-3, "weight_decay": 0.1}
    )
    assert lora_plus.for_trainer(peft, Adapter(), block) == {}
    assert lora_plus.for_trainer(peft, Adapter(lr_ratio=1), block) == {}
    kind, options = lora_plus.for_trainer(peft, Adapter(lr_ratio=16), block)["optimizer_cls_and_kwargs"]
    optimizer = kind(**options)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (1e-3, 0.1, 1),
        (1.6e-2, 0.1, 1),
    ]
    named = {id(p): n for n, p in peft.named_parameters()}
    assert "lora_B" in named[id(optimizer.param_groups[1]["params"][0])]


@pytest.mark.fast
def test_a_role_of_two_groups_is_clipped_by_one_norm() -> None:
    """Gradients 3 and 4 have the norm 5: with a limit of 1 they become 0.6 and 0.8."""
    first, second, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD(
        [
            {"params": [first], "name": "policy", "role": "policy", "max_grad_norm": 1.0, "lr": 1.0},
            {"params": [second], "name": "policy_B", "role": "policy", "max_grad_norm": 1.0, "lr": 10.0},
            {"params": [other], "name": "critic", "max_grad_norm": 1.0, "lr": 1.0},
        ]
    )
    clipping = engine.RoleClipping(optimizer, partitioned=False)
    first.grad, second.grad, other.grad = (torch.tensor([x]) for x in (3.0, 4.0, 0.5))
    clipping.measure(SimpleNamespace(optimizer=optimizer, device=torch.device("cpu")))
    optimizer.step()
    assert [float(p) for p in (first, second, other)] == pytest.approx([-0.6, -8.0, -0.5], rel=1e-5)
    assert clipping.norms == pytest.approx({"policy": 5.0, "critic": 0.5})


@pytest.fixture(scope="module")
def published(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA policy, whose second factors are not 0, and a reward model: (recipe, run directory)."""
    folder = tmp_path_factory.mktemp("plus")
    changes = {f"stages__{stage}__steps": 2 for stage in ("sft", "reward")}
    recipe, run = tiny.recipe(folder / "r.yaml", tiny_llama, **changes), folder / "run"
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(run), until="reward")
    return recipe, run


def factors(weights: dict[str, torch.Tensor], factor: str, role: str = "") -> torch.Tensor:
    return torch.cat([w.flatten() for n, w in sorted(weights.items()) if factor in n and role in n])


def test_first_update_of_trl_s_stages(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """Adam's first step moves a weight by the learning rate. Second factors start at 0, so that the first ones have no
    gradient yet: with and without LoRA+ they are the same, and the second factors' sizes are as the ratio."""
    found = {}
    for name, ratio in (("plain", None), ("plus", RATIO)):
        changes: dict[str, Any] = {f"stages__sft__{key}": v for key, v in {"steps": 1, "warmup": 0, "lr": 1e-3}.items()}
        recipe = tiny.recipe(tmp_path / f"{name}.yaml", tiny_llama, adapter__lr_ratio=ratio, **changes)
        run = tmp_path / name
        ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage="sft", run_dir=str(run))
        found[name] = load_file(run / "sft" / "output" / "adapter_model.safetensors")
    assert torch.equal(factors(found["plain"], "lora_A"), factors(found["plus"], "lora_A"))
    assert factors(found["plain"], "lora_B").abs().median() == pytest.approx(1e-3, rel=1e-2)
    assert factors(found["plus"], "lora_B").abs().median() == pytest.approx(RATIO * 1e-3, rel=1e-2)


def test_second_factors_follow_the_schedule_in_trl_s_stages(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """The logged rate is the first factors'; after a warm-up's step of 0 nothing has moved, the second factors neither."""
    recipe = tiny.recipe(
        tmp_path / "r.yaml", tiny_llama, adapter__lr_ratio=RATIO, stages__sft__warmup=1, stages__sft__steps=1
    )
    ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage="sft", run_dir=str(tmp_path / "run"))
    assert not factors(load_file(tmp_path / "run/sft/output/adapter_model.safetensors"), "lora_B").any()


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_rates_and_one_norm_in_ppo(ranks: Get, published: tuple[Path, Path], tmp_path: Path, zero: str) -> None:
    """Plain gradient descent shows the clipped gradient: change / rate. Its norm over both groups is the limit, and the
    reported norm is that of the gradient without LoRA+."""
    recipe, run = published
    overrides = [
        f"deepspeed.config={zero}",
        "stages.ppo.optimizer=sgd",
        "stages.ppo.lr=1.0",
        "stages.ppo.critic.lr=0.5",
        "stages.ppo.warmup=0",
        "stages.ppo.minibatches=1",
        "stages.ppo.lr_schedule=constant",
        "stages.ppo.max_grad_norm=0.01",
    ]
    found, stats = {}, {}
    for name, more in (("plain", []), ("plus", [f"stages.ppo.adapter.lr_ratio={RATIO}"])):
        target = tmp_path / f"{name}.pt"
        stats[name] = ranks(2).call(
            "tests.adapters.cases:one_update",
            recipe=str(recipe),
            run_dir=str(run),
            overrides=[*overrides, *more],
            target=str(target),
        )[0]
        both = torch.load(target, weights_only=True)
        found[name] = {n: both["after"][n] - both["before"][n] for n in both["before"]}
    assert {k: v for k, v in stats["plus"].items() if k.startswith("lr/")} == {
        "lr/policy": 1.0,
        "lr/policy_B": RATIO,
        "lr/critic": 0.5,
        "lr/critic_B": 0.5 * RATIO,
    }
    for role, rate in (("policy", 1.0), ("critic", 0.5)):
        norm = stats["plus"][f"grad_norm/{role}"]
        assert norm == pytest.approx(stats["plain"][f"grad_norm/{role}"], rel=1e-5)
        assert norm > 0.01, "nothing is clipped"
        own = {n: c for n, c in found["plus"].items() if n.endswith(f".{role}.weight")}
        square = sum(float((c / (rate * (RATIO if "lora_B" in n else 1.0))).pow(2).sum()) for n, c in own.items())
        assert math.sqrt(square) == pytest.approx(0.01, rel=1e-3)
        for name, change in own.items():
            factor = RATIO if "lora_B" in name else 1.0
            torch.testing.assert_close(change, factor * found["plain"][name], rtol=1e-3, atol=1e-7)
