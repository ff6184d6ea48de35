"""The distill stage on ranks: what it publishes and learns, under ZeRO 2 and 3, after a resume, and however it is cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import handoff
from pipeline.config.recipe import load
from pipeline.errors import UserError
from pipeline.model.load import tokenizer
from pipeline.stage import Context
from stages.distill.teacher import check_vocabulary
from stages.distill.training import on_policy
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
RUN = "tests.support.stages:run"
LORA = {"method": "lora", "r": 4, "alpha": 8}
SAMPLING = {"max_prompt_length": 32, "max_response_length": 12}


def recipe(path: Path, base: Path, method: dict[str, Any] | None = None, **changes: Any) -> Path:
    """SFT and a student of it that starts from the base; `changes` are keys of the stage, or of the recipe with `__`."""
    stage: dict[str, Any] = {
        "kind": "distill",
        "teacher": "sft",
        "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl")}],
        "steps": 2,
        "batch": 8,
        "micro_batch": 2,
        "lr": 1e-2,
        "warmup": 0,
        "save_every": 1,
        "keep_checkpoints": 5,
        "log_every": 1,
        "eval_rows": 16,
        "sampling": SAMPLING,
        "adapter": method or LORA,
    }
    outer = {key: changes.pop(key) for key in list(changes) if "__" in key}
    tiny.recipe(path, base, **outer, stages__distill={**stage, **changes})
    return path


def sft(ranks: Get, base: Path, folder: Path) -> Path:
    """A run whose `sft` stage is published."""
    ranks(2).call(RUN, recipe=str(recipe(folder / "r.yaml", base)), stage="sft", run_dir=str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def taught(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sft(ranks, tiny_llama, tmp_path_factory.mktemp("taught"))


def files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "distill" / "output").iterdir()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = sorted((run / "distill" / "output").glob("*.safetensors"))
    return {name: value for file in found for name, value in load_file(file).items()}


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run / "sft", folder / "run" / "sft")
    return folder / "run"


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("method", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_resumed_after_one_step(
    ranks: Get, tiny_llama: Path, taught: Path, tmp_path: Path, method: dict[str, Any], zero: int
) -> None:
    """Own replies in every batch. From its first checkpoint the stage publishes the same bytes."""
    run = copied(taught, tmp_path)
    changes: dict[str, Any] = {"deepspeed": {"config": f"zero{zero}"}, "lmbda": 1.0}
    path = recipe(tmp_path / "r.yaml", tiny_llama, method, **changes)
    assert len(set(ranks(2).call(RUN, recipe=str(path), stage="distill", run_dir=str(run)))) == 1
    first, checkpoints = files(run), run / "distill" / "checkpoints"
    assert handoff.open_baton(run / "distill").is_adapter == (method is LORA)

    shutil.rmtree(run / "distill" / "output")
    shutil.rmtree(checkpoints / "checkpoint-2")
    ranks(2).call(RUN, recipe=str(path), stage="distill", run_dir=str(run))
    assert files(run) == first


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_cuts_of_the_batch_change_nothing(
    ranks: Get, tiny_llama: Path, taught: Path, tmp_path: Path, lmbda: float
) -> None:
    """One step on one rank or two, in micro-batches of one, two or four, sharded or not: one student."""
    found = []
    for number, (world, micro, zero) in enumerate(((2, 2, 2), (1, 4, 2), (2, 1, 3))):
        run = copied(taught, tmp_path / str(number))
        path = recipe(
            tmp_path / f"{number}.yaml",
            tiny_llama,
            steps=1,
            lmbda=lmbda,
            micro_batch=micro,
            deepspeed={"config": f"zero{zero}"},
        )
        ranks(world).call(RUN, recipe=str(path), stage="distill", run_dir=str(run))
        found.append((weights(run), handoff.open_baton(run / "distill").manifest["metrics"]))
    change = {name: value for name, value in found[0][0].items() if "lora_B" in name}  # they start at zero
    for other, metrics in found[1:]:
        for name, value in change.items():
            # Adam makes a whole step of the smallest gradient: entries of rounding alone may differ.
            assert (other[name] - value).norm() < 2e-3 * value.norm(), name
        for name, number in found[0][1].items():
            assert metrics[name] == pytest.approx(number, rel=1e-3), name


def test_teacher_on_the_students_base_is_no_second_copy(
    ranks: Get, tiny_llama: Path, taught: Path, tmp_path: Path
) -> None:
    run = copied(taught, tmp_path)
    shared = ranks(1).call(
        "tests.distributed.distill_cases:sides", recipe=str(recipe(tmp_path / "a.yaml", tiny_llama)), run_dir=str(run)
    )[0]
    assert shared["trunks"] == ["student"]
    assert shared["storages"] == shared["base_parameters"]
    assert shared["difference"] < 1e-4
    assert shared["apart"] > 1e-2, "the student starts as the base"
    assert shared["trained"] == ["default"]

    path = recipe(tmp_path / "b.yaml", tiny_llama, {"method": "full"})
    apart = ranks(1).call("tests.distributed.distill_cases:sides", recipe=str(path), run_dir=str(run))[0]
    assert apart["trunks"] == ["student", "teacher"]
    assert apart["storages"] == 2 * apart["base_parameters"]
    assert apart["difference"] < 1e-4


def test_a_teacher_from_outside_and_prompts_alone(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """Another model of the same vocabulary teaches on replies of the student's own; metrics say what was trained on."""
    teacher = tiny.model(tmp_path / "teacher", "llama_small", seed=3)
    path = recipe(
        tmp_path / "r.yaml",
        tiny_llama,
        teacher={"model": str(teacher)},
        data=[{"path": str(tiny.QUICKSTART / "prompts.jsonl")}],
        lmbda=1.0,
        beta=0.0,
        gradient_checkpointing=True,
        deepspeed={"config": "zero3"},
        steps=4,
        eval_every=2,
        eval_rows=8,
        save_every=None,
        publish="best",
    )
    run = tmp_path / "run"
    ranks(2).call(RUN, recipe=str(path), stage="distill", run_dir=str(run))
    lines = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 4], "the last one of what is published"
    assert all("eval_nll" not in line for line in lines), "the data has no replies to take a loss of"
    assert all(line["on_policy"] == 1.0 for line in lines if "on_policy" in line)
    metrics = handoff.open_baton(run / "distill").manifest["metrics"]
    assert metrics["held_out/divergence"] == pytest.approx(metrics["held_out/forward_kl"], rel=1e-5)
    assert metrics["held_out/divergence"] == pytest.approx(min(line["eval_loss"] for line in evaluated[:2]), rel=1e-5)


def test_it_comes_nearer_to_the_teacher(ranks: Get, tmp_path: Path) -> None:
    """On the quickstart's base, a student of SFT: every divergence lowers the held-out forward KL by more than a half."""
    base, found = tiny.QUICKSTART / "base", {}
    changes = {"sft__steps": 20, "sft__batch": 16, "sft__micro_batch": 8, "sft__lr": 2e-3, "sft__save_every": None}
    outer = {f"stages__{key}": value for key, value in changes.items()}
    options: dict[str, dict[str, Any]] = {
        "start": {"steps": 1, "lr": 1e-9},
        "forward": {"beta": 0.0, "lmbda": 0.0},
        "jsd": {"beta": 0.5, "lmbda": 0.5},
        "reverse": {"beta": 1.0, "lmbda": 1.0},
    }
    for name, option in options.items():
        given = {"steps": 12, "lr": 5e-3, "batch": 16, "micro_batch": 8, "save_every": None, **option}
        path = recipe(tmp_path / f"{name}.yaml", base, **outer, **given)
        stages = ["sft", "distill"] if name == "start" else ["distill"]
        for stage in stages:
            ranks(2).call(RUN, recipe=str(path), stage=stage, run_dir=str(tmp_path / "run"))
        found[name] = handoff.open_baton(tmp_path / "run" / "distill").manifest["metrics"]["held_out/forward_kl"]
    assert all(found[name] < 0.5 * found["start"] for name in ("forward", "jsd", "reverse")), found


def test_shipped_chain_shortened(ranks: Get, tmp_path: Path) -> None:
    """SFT, reward model, PPO and a student of PPO's policy whose adapter is smaller; its manifest names its one teacher."""
    steps = [f"stages.{stage}.steps=1" for stage in ("sft", "reward", "ppo", "distill")]
    short = ["stages.ppo.rollout_batch=8", "stages.ppo.eval_rows=4", "stages.distill.eval_rows=8"]
    short += [f"stages.{stage}.sampling.max_response_length=8" for stage in ("ppo", "distill")]
    hashes = ranks(2).call(
        "tests.support.stages:chain", recipe="distill", run_dir=str(tmp_path), overrides=[*steps, *short]
    )[0]
    baton = handoff.open_baton(tmp_path / "distill")
    assert baton.manifest["parents"] == {"ppo": hashes["ppo"]}
    assert {
        value.shape[0]
        for name, value in load_file(baton.path / "adapter_model.safetensors").items()
        if "lora_A" in name
    } == {4}


def test_share_of_own_replies() -> None:
    """By seed and step alone, about `lmbda` of the steps, none at 0 and all at 1."""
    taken = [on_policy(7, step, 0.3) for step in range(2000)]
    assert taken == [on_policy(7, step, 0.3) for step in range(2000)]
    assert 0.27 < sum(taken) / 2000 < 0.33
    assert taken != [on_policy(8, step, 0.3) for step in range(2000)]
    assert not any(on_policy(7, step, 0.0) for step in range(2000))
    assert all(on_policy(7, step, 1.0) for step in range(2000))


def test_another_vocabulary_is_refused(tiny_llama: Path, test_data: Path, tmp_path: Path) -> None:
    loaded = load(recipe(tmp_path / "r.yaml", tiny_llama, teacher={"model": str(test_data / "stories260K")}))
    block: Any = loaded.stages["distill"]
    context = Context(loaded, "distill", tmp_path, 0, 1, {}, {})
    with pytest.raises(UserError, match="is not the student's"):
        check_vocabulary(context, block.teacher, tokenizer(str(tiny_llama)))
