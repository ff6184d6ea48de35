"""What Relay lays over a DeepSpeed configuration, the learning-rate schedules, and clipping by role."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from pipeline import chain, engine
from pipeline.config.recipe import DS_CONFIGS, deepspeed_config, load
from pipeline.config.schema import Schedule
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

SHIPPED = sorted(DS_CONFIGS.glob("*.json"))
REFERENCES: dict[str, Callable[[torch.optim.Optimizer, int, int], Any]] = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0, 40, 0), (5, 40, 5), (0.1, 40, 4), (0.03, 33, 1), (40, 40, 40), (99, 40, 99), (0.5, 1, 1), (0, 1, 0)],
)
def test_schedules_are_those_of_transformers(name: Any, warmup: float, total: int, steps: int) -> None:
    """At every step."""
    schedule = Schedule(lr_schedule=name, warmup=warmup)
    assert engine.warmup_steps(schedule, total) == steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = REFERENCES[name](optimizer, steps, total)
    for step in range(total):
        expected = reference.get_last_lr()[0]
        assert engine.learning_rate_factor(schedule, step, total) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        reference.step()


def test_schedule_by_hand() -> None:
    schedule = Schedule(lr_schedule="cosine", warmup=2)
    factors = [engine.learning_rate_factor(schedule, step, 6) for step in range(7)]
    assert factors == pytest.approx([0, 0.5, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_overlay_lays_the_recipe_s_keys() -> None:
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 5.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "steps_per_print": 7,
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 2},
    }
    before = copy.deepcopy(config)
    found = engine.overlay(config, dtype="fp16", micro_batch=2, accumulation=3, max_grad_norm=0.5)
    assert config == before
    assert found == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 7,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }


@pytest.mark.parametrize(("dtype", "block"), [("fp32", set()), ("bf16", {"bf16"}), ("fp16", {"fp16"})])
def test_overlay_switches_one_dtype_on(dtype: Any, block: set[str]) -> None:
    config = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    found = engine.overlay(config, dtype=dtype, micro_batch=1, accumulation=1, max_grad_norm=0.0)
    assert found.keys() & {"bf16", "fp16"} == block


def test_overlay_drops_auto_at_any_depth() -> None:
    config = {
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "wall_clock_breakdown": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "offload_param": {"device": "cpu", "buffer_size": "auto"},
        },
    }
    found = engine.overlay(config, dtype="bf16", micro_batch=1, accumulation=1, max_grad_norm=1.0)
    assert "auto" not in json.dumps(found)
    assert found["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}, "sub_group_size": 10**12}
    assert found["gradient_clipping"] == 1.0
    assert "wall_clock_breakdown" not in found


def test_zero_stage_is_read_from_the_configuration() -> None:
    assert engine.zero_stage({}) == 0
    assert engine.zero_stage({"zero_optimization": {"stage": 3}}) == 3


def test_six_configurations_ship() -> None:
    assert [p.stem for p in SHIPPED] == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_complete(path: Path) -> None:
    """Plain DeepSpeed refuses `auto`, and needs the batch, a dtype and an optimizer."""
    config = json.loads(path.read_text(encoding="utf-8"))
    assert "auto" not in path.read_text(encoding="utf-8")
    assert {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "bf16"} <= config.keys()
    assert str(engine.zero_stage(config)) == path.stem[4]
    assert ("offload_optimizer" in config["zero_optimization"]) == path.stem.endswith("offload")


# Reading the configuration a stage names.


def read(folder: Path, config: str, dtype: str = "bf16") -> dict[str, Any]:
    (folder / "r.yaml").write_text(
        f"name: r\nbase: {{model: base, dtype: {dtype}}}\ndeepspeed: {{config: {config}}}\n"
        "stages: {sft: {kind: sft, data: [{path: d.jsonl}], lr: 1.0e-3}}\n",
        encoding="utf-8",
    )
    return deepspeed_config(load(folder / "r.yaml"), "sft")


def test_a_configuration_is_shipped_or_lies_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert engine.zero_stage(read(tmp_path, "zero3_offload")) == 3
    assert engine.zero_stage(read(tmp_path, "mine.json")) == 1


def test_a_missing_or_broken_configuration_is_told(tmp_path: Path) -> None:
    where = r"recipe r\.yaml: stages\.sft\.deepspeed\.config: "
    with pytest.raises(UserError, match=where + 'no configuration "zero4"\n  expected a JSON file or one of: zero0'):
        read(tmp_path, "zero4")
    (tmp_path / "mine.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=where + r".*mine\.json is not valid JSON"):
        read(tmp_path, "mine.json")


def test_deepspeeds_generating_kernels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"hybrid_engine": {"enabled": true}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"enables hybrid_engine, whose kernels .*\n  fix: leave hybrid_engine out"):
        read(tmp_path, "mine.json")
    (tmp_path / "mine.json").write_text('{"hybrid_engine": {"enabled": false}}', encoding="utf-8")
    assert read(tmp_path, "mine.json") == {"hybrid_engine": {"enabled": False}}


@pytest.mark.parametrize("config", ["zero0", "mine.json"])
def test_fp16_without_zero_is_refused(tmp_path: Path, config: str) -> None:
    """DeepSpeed 0.19 scales no loss there and divides the gradients all the same (its pull request 8393)."""
    (tmp_path / "mine.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"trains in fp16 without ZeRO.*\n  fix: use zero1, or `dtype: bf16`"):
        read(tmp_path, config, "fp16")
    for fine in (("zero1", "fp16"), ("zero0", "bf16")):
        assert read(tmp_path, *fine)


# Clipping by role.


def update(critic_scale: float, limit: float) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """One SGD step of a policy and a critic with gradients (3, 4) and `critic_scale` x (3, 4)."""
    policy, critic = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD(
        [
            {"params": [policy], "name": "policy", "max_grad_norm": limit},
            {"params": [critic], "name": "critic", "max_grad_norm": limit},
        ],
        lr=1.0,
    )
    clipping = engine.RoleClipping(optimizer, partitioned=False)
    policy.grad, critic.grad = torch.tensor([3.0, 4.0]), critic_scale * torch.tensor([3.0, 4.0])
    optimizer.step()
    return policy.detach(), critic.detach(), clipping.norms


def test_each_role_is_clipped_by_its_own_norm() -> None:
    policy, critic, norms = update(100.0, 1.0)
    torch.testing.assert_close(policy, torch.tensor([-0.6, -0.8]), rtol=0, atol=1e-5)
    torch.testing.assert_close(critic, torch.tensor([-0.6, -0.8]), rtol=0, atol=1e-5)
    assert norms == pytest.approx({"policy": 5.0, "critic": 500.0})
    assert torch.equal(policy, update(1.0, 1.0)[0]), "the critic's gradient does not reach the policy's update"


def test_small_gradients_and_a_limit_of_zero_are_left_alone() -> None:
    for limit in (10.0, 0.0):
        policy, _, norms = update(1.0, limit)
        torch.testing.assert_close(policy, torch.tensor([-3.0, -4.0]))
        assert norms["policy"] == pytest.approx(5.0)


# The same bits again.


def test_repeated_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that torch and cuBLAS ask for; an operation that has no deterministic form is warned of by name, and runs."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    try:
        engine.repeat_bits()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.warns(UserWarning, match="put_"):
            found = torch.zeros(2).put_(torch.tensor([1]), torch.tensor([3.0]), accumulate=False)
        assert found.tolist() == [0.0, 3.0]
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_determinism_is_no_part_of_the_work(tmp_path: Path) -> None:
    """Published stages stay up to date when it is asked for."""
    read(tmp_path, "zero2")
    plain, asked = (load(tmp_path / "r.yaml", given) for given in ([], ["deterministic=true"]))
    assert asked.header.deterministic
    assert not plain.header.deterministic
    assert chain.resolved(asked.stages["sft"]) == chain.resolved(plain.stages["sft"])
