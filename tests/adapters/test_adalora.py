"""AdaLoRA against PEFT's own in one process: budgets, masks, statistics, the orthogonality term; resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.adapters import adalora
from pipeline.config.schema import Adapter
from pipeline.errors import UserError
from tests.adapters import reference
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
ADALORA = {"method": "adalora", "init_r": 5, "target_r": 2, "tinit": 0.2, "tfinal": 0.25, "alpha": 16}


# In one process.


@pytest.mark.fast
def test_shares_of_the_stage_s_steps() -> None:
    """0.1 of 25 steps is 3, rounded up as a warm-up is; 4 steps are 4."""
    found = adalora.config(Adapter(method="adalora", tinit=0.1, tfinal=4), 25, ["q_proj"], "SEQ_CLS")
    assert (found.tinit, found.tfinal, found.total_step) == (3, 4, 25)
    assert (found.init_r, found.target_r, found.deltaT, found.lora_alpha) == (12, 8, 1, 32)
    assert found.modules_to_save == ["score"]
    # Without a last phase the ranks would never become final.
    assert adalora.config(Adapter(method="adalora", tinit=0, tfinal=0), 25, ["q_proj"], "CAUSAL_LM").tfinal == 1


@pytest.mark.fast
def test_what_leaves_no_step_to_allocate_in_is_refused() -> None:
    with pytest.raises(UserError, match="ranks would be pruned between step 5 and step 5, of 10"):
        adalora.config(Adapter(method="adalora", tinit=0.5, tfinal=5), 10, ["q_proj"], "CAUSAL_LM")


@pytest.mark.fast
def test_orthogonality_against_numpy() -> None:
    """||P P^T - I||_F and its gradient by central differences, both in float64."""
    rows = np.random.default_rng(0).normal(size=(3, 7)) * 0.4

    def value(p: np.ndarray) -> float:
        return float(np.sqrt(((p @ p.T - np.eye(3)) ** 2).sum()))

    norm, slope = adalora.orthogonality(torch.tensor(rows, dtype=torch.float32))
    assert float(norm) == pytest.approx(value(rows), rel=1e-6)
    for place in np.ndindex(rows.shape):
        step = np.zeros_like(rows)
        step[place] = 1e-5
        expected = (value(rows + step) - value(rows - step)) / 2e-5
        assert float(slope[place]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    norm, slope = adalora.orthogonality(torch.eye(3, 7))
    assert float(norm) == 0.0
    assert not slope.any(), "orthonormal rows are left alone"


@pytest.mark.fast
def test_penalty_against_numpy() -> None:
    """The mean over both singular matrices of every layer, times the weight."""
    peft = reference.model(reference.settings())
    allocation, plain = adalora.Allocation(peft), SimpleNamespace(optimizer=object())
    allocation.before_step(plain, 0)
    norms = []
    for name, parameter in peft.named_parameters():
        matrix = parameter.detach().double().numpy()
        if "lora_A" in name:
            norms.append(np.linalg.norm(matrix @ matrix.T - np.eye(5)))
        if "lora_B" in name:
            norms.append(np.linalg.norm(matrix.T @ matrix - np.eye(5)))
    assert len(norms) == 2 * len(reference.TARGETS) * 2
    assert allocation.metrics() == {"orthogonality": pytest.approx(0.1 * np.mean(norms), rel=1e-6), "mean_rank": 5.0}


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
    """What PEFT's own AdaLoRA gives in one process; its ranks differ between layers."""
    weights, pattern = reference.trained()
    kept = [sum(mask) for mask in pattern.values()]
    assert sum(kept) == reference.ADAPTER.target_r * len(kept)
    assert len(set(kept)) > 1, "every layer has the same rank: nothing was allocated"
    return weights, pattern


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative distance of the worst kind of matrix."""
    assert ours.keys() == theirs.keys()
    kinds = [found for kind in adalora.MATRICES if (found := [n for n in ours if kind in n])]
    flat = [[torch.cat([side[n].flatten() for n in names]) for side in (ours, theirs)] for names in kinds]
    assert all(theirs.abs().max() > 1e-3 for _, theirs in flat)
    return max(float((left - right).norm() / right.norm()) for left, right in flat)


@pytest.mark.fast
def test_plain_loop_equals_peft(expected: Any) -> None:
    """The same steps, the loss without PEFT's term: it is in the gradients."""
    peft = reference.model(reference.settings())
    allocation = adalora.Allocation(peft)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=reference.RATE)
    plain = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: True)
    seen = []
    for step in range(reference.STEPS):
        tokens = reference.rows(step)
        peft(input_ids=tokens, labels=tokens).loss.backward()
        allocation.before_step(plain, step)
        optimizer.step()
        allocation.after_step(plain, step)
        optimizer.zero_grad()
        seen.append((allocation.exact, allocation.metrics()["mean_rank"]))
    assert distance(reference.weights(dict(peft.named_parameters())), expected[0]) < 1e-6
    assert allocation.pattern == expected[1]
    assert [step for step, (exact, _) in enumerate(seen) if exact] == [4, 6, 8, 9, 10, 11]
    # 30 singular values; the cubic schedule from 30 to 12 over steps 2 to 9 leaves 18 (1 - k/7)^3 + 12.
    budgets = {4: 18 * (5 / 7) ** 3 + 12, 6: 18 * (3 / 7) ** 3 + 12, 8: 18 * (1 / 7) ** 3 + 12, 9: 12}
    assert {step: seen[step][1] * 6 for step in budgets} == {step: int(size) for step, size in budgets.items()}
    assert all("ranknum" not in n for n, p in peft.named_parameters() if p.requires_grad)


@pytest.mark.fast
def test_published_ranks_are_those_that_are_left(tmp_path: Path) -> None:
    """PEFT prunes what it writes while the masks hold, and nothing between two of them."""
    peft = reference.model(reference.settings())
    allocation = adalora.Allocation(peft)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=reference.RATE)
    plain = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: True)
    for step in range(reference.STEPS):
        tokens = reference.rows(step)
        peft(input_ids=tokens, labels=tokens).loss.backward()
        allocation.before_step(plain, step)
        optimizer.step()
        allocation.after_step(plain, step)
        optimizer.zero_grad()
        if step not in (6, 7, 11):
            continue
        allocation.publish()
        folder = tmp_path / str(step)
        peft.save_pretrained(folder)
        opened = PeftModel.from_pretrained(tiny.build("llama"), folder).eval()
        with torch.no_grad():
            written, trained = opened(input_ids=tokens).logits, peft.eval()(input_ids=tokens).logits
        peft.train()
        assert (written - trained).abs().max() < 1e-4, step
        ranks = [len(w) for n, w in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n]
        assert sum(ranks) == {6: int(18 * (3 / 7) ** 3 + 12), 7: 30, 11: 12}[step]


@pytest.mark.fast
def test_layers_without_ranks_do_without_the_adapter(expected: Any, tmp_path: Path) -> None:
    """What a pruned adapter says does not change when it is taken off the layers that it has no rank in."""
    peft = reference.model(reference.settings())
    pattern = {n.replace(".default", ""): kept for n, kept in expected[1].items()}
    first = next(iter(pattern))
    peft.peft_config["default"].rank_pattern = {**pattern, first: [False] * 5}
    peft.load_state_dict(expected[0], strict=False)
    peft.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    with torch.no_grad():
        before = opened(input_ids=reference.rows(0)).logits
        assert any(p.numel() == 0 for p in opened.parameters())
        adalora.leave_out_empty(opened, "default")
        assert all(p.numel() for p in opened.parameters())
        assert torch.equal(opened(input_ids=reference.rows(0)).logits, before)


@pytest.mark.fast
def test_a_schedule_that_begins_late_or_skips_steps_ends_all_the_same() -> None:
    """As PPO's does while the actor is frozen, and when an update stops early."""
    peft = reference.model(reference.settings())
    allocation = adalora.Allocation(peft, first=3)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=reference.RATE)
    plain = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: True)
    for step in (0, 1, 2, 3, 4, 5, 7, 10, 11):  # 9 is the step after which ranks are final
        tokens = reference.rows(step)
        peft(input_ids=tokens, labels=tokens).loss.backward()
        allocation.before_step(plain, step)
        optimizer.step()
        allocation.after_step(plain, step)
        optimizer.zero_grad()
        assert bool(allocation.budget.exp_avg_ipt) == (3 <= step < 9)
    assert allocation.fixed
    assert allocation.metrics()["mean_rank"] == 2.0
    with pytest.raises(UserError, match="ranks would be pruned between step 2 and step 2, of 5"):
        adalora.Allocation(reference.model(reference.settings()), first=7)


@pytest.mark.fast
def test_statistics_come_back(tmp_path: Path) -> None:
    """Saved after step 6 and loaded into a new one, with the weights: the next steps are the same to the last bit."""
    runs = []
    for stop in (None, 6):
        peft = reference.model(reference.settings())
        allocation = adalora.Allocation(peft)
        for step in range(reference.STEPS):
            optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=reference.RATE)
            plain = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: True)
            peft(input_ids=reference.rows(step), labels=reference.rows(step)).loss.backward()
            allocation.before_step(plain, step)
            optimizer.step()
            allocation.after_step(plain, step)
            optimizer.zero_grad()
            if step == stop:
                allocation.save(tmp_path)
                kept = peft.state_dict()
                peft = reference.model(reference.settings())
                peft.load_state_dict(kept)
                allocation = adalora.Allocation(peft)
                allocation.load(tmp_path)
        runs.append((reference.weights(dict(peft.named_parameters())), allocation.pattern, allocation.metrics()))
    assert runs[0][1:] == runs[1][1:]
    assert all(torch.equal(runs[0][0][n], runs[1][0][n]) for n in runs[0][0])


# On two ranks.


@pytest.mark.parametrize(
    ("zero", "changes"),
    [
        ("zero0", {}),
        ("zero1", {}),
        ("zero2", {}),
        ("zero3", {}),
        ("zero3", {"stage3_param_persistence_threshold": 0}),
    ],
    ids=["0", "1", "2", "3", "3 all sharded"],
)
def test_two_ranks_equal_peft(ranks: Get, expected: Any, tmp_path: Path, zero: str, changes: dict[str, Any]) -> None:
    target = str(tmp_path / "trained.pt")
    ranks(2).call("tests.adapters.cases:trained", zero=zero, target=target, **changes)
    found = torch.load(target, weights_only=True)
    assert found["pattern"] == expected[1]
    assert distance(found["weights"], expected[0]) < 1e-6
    assert distance(found["masters"], expected[0]) < 1e-6


def test_clipping_counts_the_term(ranks: Get, tmp_path: Path) -> None:
    """Also where DeepSpeed takes the norm of an offloaded gradient before the term is added."""
    found = {}
    for zero in ("zero0", "zero2_offload", "zero3_offload"):
        target = str(tmp_path / zero)
        ranks(2).call("tests.adapters.cases:trained", zero=zero, target=target, max_grad_norm=0.05)
        found[zero] = torch.load(target, weights_only=True)["weights"]
    assert distance(found["zero2_offload"], found["zero0"]) < 1e-5
    assert distance(found["zero3_offload"], found["zero0"]) < 1e-5


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_float32_accumulation_of_bf16(ranks: Get, tmp_path: Path, zero: str) -> None:
    """DeepSpeed keeps gradients elsewhere then; the result is near that of float32 all through."""
    kept = []
    for name, options in (("plain", {}), ("other", {"dtype": "bf16", "accumulate": "fp32"})):
        target = str(tmp_path / name)
        ranks(2).call("tests.adapters.cases:trained", zero=zero, target=target, **options)
        masters = torch.load(target, weights_only=True)["masters"]
        kept.append({n: w for n, w in masters.items() if "lora_E" not in n})  # which ranks are left may differ
    assert distance(kept[1], kept[0]) < 0.02


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_bf16_masks_the_float32_masters_too(ranks: Get, tmp_path: Path, zero: str) -> None:
    """Pruned singular values are 0 in weights and masters; the masters of the others keep their float32 precision."""
    target = str(tmp_path / "trained.pt")
    ranks(2).call("tests.adapters.cases:trained", zero=zero, target=target, dtype="bf16")
    found = torch.load(target, weights_only=True)
    assert not any("ranknum" in name for name in found["weights"])
    fine = 0
    for name, kept in found["pattern"].items():
        keep = torch.tensor(kept)
        full = next(n for n in found["weights"] if n.endswith(name))
        for side in ("weights", "masters"):
            values = found[side][full].flatten()
            assert not values[~keep].any()
            assert values[keep].all()
        fine += int((found["masters"][full].bfloat16().float() != found["masters"][full]).sum())
        torch.testing.assert_close(found["masters"][full].bfloat16().float(), found["weights"][full], rtol=0, atol=0)
    assert fine > 0


@pytest.fixture(scope="module")
def published(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An AdaLoRA policy and reward model: (recipe, run directory). Checkpoints are kept."""
    folder = tmp_path_factory.mktemp("adalora")
    changes: dict[str, Any] = {
        "adapter": ADALORA,
        "stages__ppo__critic": {"init": "policy"},
        "stages__ppo__adapter": {},
    }
    changes["stages__ppo__steps"] = 5
    for stage in ("sft", "reward", "ppo"):
        changes |= {f"stages__{stage}__save_every": 1, f"stages__{stage}__keep_checkpoints": 20}
    changes |= {f"stages__{stage}__steps": 8 for stage in ("sft", "reward")}
    recipe, run = tiny.recipe(folder / "r.yaml", tiny_llama, **changes), folder / "run"
    ranks(2).call("tests.support.stages:chain", recipe=str(recipe), run_dir=str(run))
    return recipe, run


def rows(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_allocates(published: tuple[Path, Path]) -> None:
    """Ranks fall to the target, differ between layers, and are what is published; the term is in TRL's stages and in PPO's
    for policy and critic."""
    _, run = published
    for stage, suffix in (("sft", ""), ("reward", ""), ("ppo", "/policy"), ("ppo", "/critic")):
        seen = [row for row in rows(run, stage) if f"mean_rank{suffix}" in row]
        assert seen[0][f"mean_rank{suffix}"] > seen[-1][f"mean_rank{suffix}"] == 2.0, (stage, suffix)
        assert all(row[f"orthogonality{suffix}"] > 0.1 for row in seen)
    for stage in ("sft", "reward", "ppo"):
        pattern = json.loads((run / stage / "output" / "adapter_config.json").read_text())["rank_pattern"]
        weights = load_file(run / stage / "output" / "adapter_model.safetensors")
        ranks_left = {n.rpartition(".")[0]: sum(kept) for n, kept in pattern.items()}
        assert sum(ranks_left.values()) == 2 * len(ranks_left)
        assert len(set(ranks_left.values())) > 1
        found = {
            n.removeprefix("base_model.model.").rpartition(".")[0]: len(w) for n, w in weights.items() if "lora_E" in n
        }
        assert found == ranks_left
        assert not any("ranknum" in name for name in weights)


def test_published_policy_opens_and_merges_plainly(published: tuple[Path, Path]) -> None:
    output = published[1] / "sft" / "output"
    base = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        without = plain(input_ids=tokens).logits
        opened = PeftModel.from_pretrained(plain, str(output)).eval()
        adapted = opened(input_ids=tokens).logits
        merged = opened.merge_and_unload()(input_ids=tokens).logits
    assert (adapted - without).abs().max() > 1e-2, "the adapter does nothing"
    assert (merged - adapted).abs().max() < 1e-4


@pytest.mark.parametrize(("stage", "step"), [("sft", 4), ("reward", 4), ("ppo", 2)])
def test_resumed_from_the_middle(ranks: Get, published: tuple[Path, Path], stage: str, step: int) -> None:
    """Every published byte is that of the undisturbed run, from a checkpoint in which ranks are being moved."""
    recipe, run = published
    output, checkpoints = run / stage / "output", run / stage / "checkpoints"
    kept = {file.name: file.read_bytes() for file in output.iterdir()}
    shutil.rmtree(output)
    for folder in checkpoints.glob("*-*"):
        if folder.is_dir() and int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)
    checkpoint = next(checkpoints.glob(f"*-{step}"))
    assert json.loads(next(checkpoint.glob("adalora-*.json")).read_text())["fixed"] is False
    assert max(float(w.max()) for w in load_file(next(checkpoint.glob("adalora-*.safetensors"))).values()) > 0
    ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage=stage, run_dir=str(run))
    assert {file.name: file.read_bytes() for file in output.iterdir()} == kept


def gradient_of_the_term(matrices: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor]:
    """By autograd, of weight x the mean over singular matrices of ||P P^T - I||_F."""
    leaves = {n: matrix.clone().requires_grad_() for n, matrix in matrices.items()}
    terms = []
    for name, matrix in leaves.items():
        gram = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
        terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
    found = torch.autograd.grad(weight * torch.stack(terms).mean(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize(("stage", "zero"), [("sft", "zero2"), ("reward", "zero1")])
def test_orthogonality_is_once_in_trl_s_gradient(
    ranks: Get, tiny_llama: Path, tmp_path: Path, stage: str, zero: str
) -> None:
    """So heavy that nothing else counts: the first step's gradient, in two micro-batches on two ranks, has its norm."""
    changes: dict[str, Any] = {f"stages__{stage}__lr": 1e-12, f"stages__{stage}__save_every": 1}
    changes |= {f"stages__{stage}__keep_checkpoints": 9, "deepspeed__config": zero}
    recipe = tiny.recipe(tmp_path / "r.yaml", tiny_llama, adapter={**ADALORA, "orth_reg_weight": 1e6}, **changes)
    ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage=stage, run_dir=str(tmp_path / "run"))
    weights = load_file(tmp_path / "run" / stage / "checkpoints/checkpoint-1/adapter_model.safetensors")
    term = gradient_of_the_term({n: w for n, w in weights.items() if "lora_A" in n or "lora_B" in n}, 1e6)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in term.values()))
    assert rows(tmp_path / "run", stage)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_best_checkpoint_s_ranks_are_published(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """A rate that grows until training gets worse, well before ranks are fixed: what is published is as it was at the best."""
    changes = {
        "lr": 3.0,
        "lr_schedule": "constant",
        "warmup": 16,
        "steps": 16,
        "eval_every": 1,
        "publish": "best",
        "save_every": None,
        "keep_checkpoints": 17,
    }
    recipe = tiny.recipe(
        tmp_path / "r.yaml",
        tiny_llama,
        adapter={**ADALORA, "orth_reg_weight": 0.1},
        **{f"stages__sft__{k}": v for k, v in changes.items()},
    )
    run = tmp_path / "run"
    ranks(2).call("tests.support.stages:run", recipe=str(recipe), stage="sft", run_dir=str(run))
    seen = [(row["eval_loss"], int(row["step"])) for row in rows(run, "sft") if "eval_loss" in row]
    best = min(seen[:16])[1]
    assert best < 16, seen
    assert seen[16][0] == pytest.approx(min(seen[:16])[0], rel=1e-6), "the model that is published is another"
    kept = json.loads((run / f"sft/checkpoints/checkpoint-{best}/adalora-default.json").read_text())
    published = json.loads((run / "sft/output/adapter_config.json").read_text())["rank_pattern"]
    pattern = {name.removesuffix(".default"): mask for name, mask in kept["pattern"].items()}
    assert published == (pattern if kept["exact"] else None)
    assert kept["fixed"] is False


@pytest.mark.parametrize(
    ("zero", "more"),
    [("zero0", []), ("zero2", []), ("zero3", ["stages.ppo.gradient_checkpointing=true", "stages.ppo.micro_batch=1"])],
)
def test_orthogonality_is_once_in_ppo_s_gradient(
    ranks: Get, published: tuple[Path, Path], tmp_path: Path, zero: str, more: list[str]
) -> None:
    """Fresh singular values are 0, so that the task's loss has no gradient for singular vectors: plain gradient descent
    moves them by the term's alone, which autograd gives here. Policy and critic share a trunk, each with its own mean."""
    overrides = [
        f"deepspeed.config={zero}",
        "stages.ppo.optimizer=sgd",
        "stages.ppo.lr=0.5",
        "stages.ppo.critic.lr=0.25",
        "stages.ppo.max_grad_norm=0",
        "stages.ppo.warmup=0",
        "stages.ppo.minibatches=1",
        "stages.ppo.lr_schedule=constant",
        *more,
    ]
    recipe, run = published
    target = tmp_path / "update.pt"
    ranks(2).call(
        "tests.adapters.cases:one_update",
        recipe=str(recipe),
        run_dir=str(run),
        overrides=overrides,
        target=str(target),
    )
    found = torch.load(target, weights_only=True)
    for role, rate in (("policy", 0.5), ("critic", 0.25)):
        names = [n for n in found["before"] if n.endswith((f"lora_A.{role}", f"lora_B.{role}"))]
        assert len(names) == 2 * 14
        for name, slope in gradient_of_the_term({n: found["before"][n] for n in names}, 0.5).items():
            moved = found["after"][name] - found["before"][name]
            torch.testing.assert_close(moved, -rate * slope, rtol=1e-3, atol=1e-7)
        values = [found["after"][n] for n in found["before"] if n.endswith(f"lora_E.{role}")]
        assert any(value.any() for value in values), "the task has no gradient"
