"""Merging adapters and exporting policies on warm ranks: NumPy on the factors, float64 TIES, DARE's choices, lineage, bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import chain, handoff
from pipeline.config.recipe import load
from pipeline.errors import UserError
from pipeline.stage import Context
from stages.merge import common_base
from tests.faults.test_resume import assert_same_files
from tests.stages.test_pretrain import PRETRAIN, recipe
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
Factors = dict[str, tuple[np.ndarray, np.ndarray]]
SFT = {
    "kind": "sft",
    "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl"), "limit": 40}],
    "steps": 2,
    "batch": 4,
    "micro_batch": 2,
    "lr": 1e-2,
    "eval_rows": 8,
}
WEIGHTS, DENSITY, SCALE = (0.7, -0.4), 0.5, 2.0
OF = {"kind": "merge", "of": ["one", "two"], "weights": list(WEIGHTS)}
STAGES: dict[str, Any] = {
    "one": SFT,
    "two": {**SFT, "data": [{"path": str(tiny.QUICKSTART / "preferences.jsonl"), "limit": 40}], "seed": 1},
    "linear": OF,
    "cat": {**OF, "combination": "cat", "adapter": {"r": 8}},
    "ties": {**OF, "combination": "ties", "density": DENSITY},
    "dare_linear": {**OF, "combination": "dare_linear", "density": DENSITY},
    "dare_ties": {**OF, "combination": "dare_ties", "density": DENSITY},
    "onward": {**SFT, "init": "ties"},
    "branch": {**PRETRAIN, "init": "one", "eval_rows": 8},
    "export": {"kind": "export", "policy": "linear", "dtype": "bf16"},
    "again": {"kind": "export", "policy": "export"},
}


class Case:
    def __init__(self, ranks: Ranks, recipe: Path, run: Path, base: Path) -> None:
        self.ranks, self.recipe, self.run, self.base = ranks, recipe, run, base

    def factors(self, stage: str) -> Factors:
        """(A [r, in], B [out, r]) of every layer of a published adapter, float64."""
        found = load_file(self.run / stage / "output" / "adapter_model.safetensors")
        names = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
        return {
            n: tuple(found[f"{n}.lora_{side}.weight"].double().numpy() for side in "AB")  # type: ignore[misc]
            for n in names
        }


@pytest.fixture(scope="module")
def case(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("merge")
    path = recipe(folder, tiny_llama, STAGES, adapter={"method": "lora", "r": 4, "alpha": 8})
    ranks(2).call("tests.support.stages:chain", recipe=str(path), run_dir=str(folder / "run"))
    return Case(ranks(2), path, folder / "run", tiny_llama)


def sides(case: Case) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """By layer, for A and for B, both stages' factors, each times the root of weight and scale; the sign goes to A."""
    one, two = case.factors("one"), case.factors("two")
    roots = [np.sqrt(abs(weight) * SCALE) for weight in WEIGHTS]
    signs = [np.sign(weight) for weight in WEIGHTS]
    return {
        name: (
            [root * sign * f[name][0] for root, sign, f in zip(roots, signs, (one, two), strict=True)],
            [root * f[name][1] for root, f in zip(roots, (one, two), strict=True)],
        )
        for name in one
    }


def change(factors: tuple[np.ndarray, np.ndarray], scale: float = SCALE) -> np.ndarray:
    return scale * factors[1] @ factors[0]


def test_linear_adds_the_factors(case: Case) -> None:
    found = case.factors("linear")
    for name, (a, b) in sides(case).items():
        np.testing.assert_allclose(change(found[name]), sum(b) @ sum(a), atol=1e-6)
        assert found[name][0].shape[0] == 4


def test_cat_is_the_sum_of_the_changes(case: Case) -> None:
    """At their weights, and at the scale of the stage's own rank and alpha: 8 / 8."""
    one, two, found = case.factors("one"), case.factors("two"), case.factors("cat")
    for name in one:
        wanted = WEIGHTS[0] * change(one[name]) + WEIGHTS[1] * change(two[name])
        np.testing.assert_allclose(change(found[name], 8 / 8), wanted, atol=1e-6)


def trimmed(values: np.ndarray) -> np.ndarray:
    """The half of the numbers with the largest magnitude, the others 0."""
    kept = np.sort(np.abs(values).ravel())[::-1][: int(DENSITY * values.size)]
    return np.where(np.abs(values) >= kept[-1], values, 0.0)


def elected(weighted: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """TIES: per number the mean over the adapters whose sign is that of their sum; `plain` [adapters, ...] elects."""
    sign = np.where(plain.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(plain) == sign
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def test_ties_in_float64(case: Case) -> None:
    """Yadav et al. 2023, section 3: trim, elect, merge; PEFT elects before it weighs."""
    one, two, found = case.factors("one"), case.factors("two"), case.factors("ties")
    for name, weighted in sides(case).items():
        merged = []
        for side in (0, 1):
            plain = np.stack([trimmed(one[name][side]), trimmed(two[name][side])])
            ours = np.stack([w * (p != 0) for w, p in zip(weighted[side], plain, strict=True)])
            merged.append(elected(ours, plain))
        np.testing.assert_allclose(change(found[name]), merged[1] @ merged[0], atol=1e-6)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_random_share(case: Case, combination: str) -> None:
    """Every number is what one of the four choices of two adapters leaves, over the density; half of them are kept."""
    one, two, found = case.factors("one"), case.factors("two"), case.factors(combination)
    kept, total = 0, 0
    for name, weighted in sides(case).items():
        for side, scale in ((0, 1.0), (1, SCALE)):
            plain = np.stack([one[name][side], two[name][side]])
            choices = []
            for mask in product((0.0, 1.0), repeat=2):
                drop = np.array(mask)[:, None, None] / DENSITY
                ours = np.stack(weighted[side]) * drop
                choices.append(ours.sum(0) if combination == "dare_linear" else elected(ours, plain * drop))
            gaps = np.abs(np.stack(choices) - scale * found[name][side])
            assert gaps.min(0).max() < 1e-6
            if combination == "dare_linear" and side == 0:  # of fresh B many numbers are alike
                chosen = gaps.argmin(0)
                kept += int((chosen >= 2).sum() + (chosen % 2).sum())
                total += 2 * chosen.size
    if combination == "dare_linear":
        assert abs(kept / total - DENSITY) < 0.05


def test_lineage_and_bytes(case: Case, tmp_path: Path) -> None:
    """Both parents are recorded; another run makes the same bytes, another seed others."""
    published = {name: handoff.open_baton(case.run / name) for name in STAGES}
    manifest = published["ties"].manifest
    assert manifest["parents"] == {name: published[name].content_hash for name in ("one", "two")}
    assert manifest["base"] == published["one"].manifest["base"]
    other = tmp_path / "run"
    for name in ("one", "two"):
        (other / name).mkdir(parents=True)
        (other / name / "output").symlink_to(case.run / name / "output")
    asked = {"recipe": str(case.recipe), "stage": "dare_ties", "run_dir": str(other)}
    case.ranks.call("tests.support.stages:run", **asked)
    assert_same_files(other, case.run, "dare_ties")
    first = (other / "dare_ties" / "output" / "adapter_model.safetensors").read_bytes()
    case.ranks.call("tests.support.stages:run", **asked, overrides=["stages.dare_ties.seed=5"])
    assert (other / "dare_ties" / "output" / "adapter_model.safetensors").read_bytes() != first


def test_stages_of_other_runs(case: Case, tmp_path: Path) -> None:
    """The same sum as within one run, with both parents in the lineage; stale when the other run has made its stage anew."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for run, stage in ((ours, "one"), (theirs, "two")):
        (run / stage).mkdir(parents=True)
        (run / stage / "output").symlink_to(case.run / stage / "output")
    stages = {"one": SFT, "linear": {**OF, "of": ["one", {"run": str(theirs), "stage": "two"}]}}
    path = recipe(tmp_path, case.base, stages, adapter={"method": "lora", "r": 4, "alpha": 8})
    asked = {"recipe": str(path), "stage": "linear", "run_dir": str(ours)}
    case.ranks.call("tests.support.stages:run", **asked)
    made, within = handoff.open_baton(ours / "linear"), handoff.open_baton(case.run / "linear")
    assert made.content_hash == within.content_hash
    assert sorted(made.manifest["parents"].values()) == sorted(within.manifest["parents"].values())
    assert set(made.manifest["parents"]) == {"one", f"{theirs}/two"}
    assert made.manifest["metrics"] == {"weight/one": WEIGHTS[0], f"weight/{theirs}/two": WEIGHTS[1]}
    assert chain.state(load(path), "linear", ours).done
    verify = [sys.executable, "-m", "pipeline.cli", "verify", str(path), "--run-dir", str(ours)]
    assert "linear" in subprocess.run(verify, capture_output=True, text=True, check=True, cwd=tiny.ROOT).stdout

    (theirs / "two" / "output").unlink()
    other = {"recipe": str(case.recipe), "stage": "two", "run_dir": str(theirs)}
    case.ranks.call("tests.support.stages:run", **other, overrides=["stages.two.seed=9"])
    state = chain.state(load(path), "linear", ours)
    assert not state.done
    assert "parents" in state.why
    done = subprocess.run(verify, capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.returncode == 2
    assert "it was made from" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"run": "nowhere", "stage": "two"}, "nowhere has no published stage two"),
        ({"run": "RUN", "stage": "tow"}, "has no published stage tow"),
        ({"run": "RUN", "stage": "cat"}, "trains another adapter than linear is to hand on"),
        ({"run": "RUN", "stage": "export"}, "which trains full|trains another adapter"),
    ],
)
def test_other_runs_are_looked_at_before_anything_runs(
    case: Case, tmp_path: Path, part: dict[str, str], words: str
) -> None:
    given = {name: value.replace("RUN", str(case.run)) for name, value in part.items()}
    stages = {"one": SFT, "linear": {**OF, "of": ["one", given]}}
    with pytest.raises(UserError, match=words):
        load(recipe(tmp_path, case.base, stages, adapter={"method": "lora", "r": 4, "alpha": 8}))


def test_a_next_stage_goes_on_training_it(case: Case) -> None:
    onward = handoff.open_baton(case.run / "onward")
    assert onward.manifest["base"] == handoff.open_baton(case.run / "ties").manifest["base"]
    before, after = case.factors("ties"), case.factors("onward")
    moved = max(np.abs(after[name][0] - before[name][0]).max() for name in before)
    assert 0 < moved < 0.05  # two steps of at most 1e-2 each, from where it was


def test_export_is_the_policy_without_its_adapter(case: Case) -> None:
    """The published model is the base with the adapter merged, rounded to bf16; exported again it is the same."""
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, case.run / "linear" / "output").merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(case.run / "export" / "output", dtype="auto")
    wanted = merged.to(torch.bfloat16).state_dict()
    assert whole.state_dict().keys() == wanted.keys()
    for name, value in whole.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, wanted[name]), name
    assert not (case.run / "export" / "output" / "adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(case.run / "again" / "output", dtype="auto").state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again[name].float(), value.float())


def test_branches_share_the_stage_above_them(case: Case) -> None:
    """Many stages read `one`; each finds it as it is, and a second run has nothing to do."""
    relay = [sys.executable, "-m", "pipeline.cli", "run", str(case.recipe), "--run-dir", str(case.run)]
    done = subprocess.run(relay, capture_output=True, text=True, check=True, cwd=tiny.ROOT)
    for name in STAGES:
        assert f"{name}  up to date" in done.stdout, done.stdout
    steps = [json.loads(line)["step"] for line in (case.run / "one" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    changed = load(case.recipe, ["stages.branch.lr=0.02"])
    states = {name: chain.state(changed, name, case.run) for name in STAGES}
    assert [name for name, state in states.items() if not state.done] == ["branch"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"one": {"adapter": {"method": "dora", "r": 4, "alpha": 8}}}, "trains dora: there is no weighted sum"),
        ({"one": {"adapter": {"method": "full"}}}, "stage one, which trains full"),
        ({"one": {"adapter": {"r": 16}}}, "trains another adapter than linear is to hand on"),
        ({"cat": {"adapter": {"r": 4}}}, r"stages.cat.adapter.r: rank 4, and cat puts 8[\s\S]*`adapter: \{r: 8\}`"),
        ({"linear": {"weights": [1.0]}}, "1 weights for 2 stages"),
        ({"linear": {"density": 0.5}}, "linear keeps everything"),
        ({"ties": {"density": None}}, "give `density`"),
        ({"linear": {"of": ["one", "one"]}}, "a stage twice"),
        ({"linear": {"of": ["one", "tow"]}}, r'no stage named "tow"'),
        ({"export": {"policy": "other"}, "other": {**SFT, "adapter": {"method": "mam"}}}, "cannot become part of the"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, dict[str, Any]], words: str) -> None:
    stages = {name: {**STAGES.get(name, {}), **changes.get(name, {})} for name in {**STAGES, **changes}}
    with pytest.raises(UserError, match=words):
        load(recipe(tmp_path, tiny.QUICKSTART / "base", stages, adapter={"method": "lora", "r": 4, "alpha": 8}))


def test_other_bases_are_refused(ranks: Get, tmp_path: Path, case: Case) -> None:
    """The run's `two`, on the base, beside a stage that stands on what `export` wrote out."""
    stages = {**STAGES, "far": {**SFT, "init": "export"}, "bad": {**OF, "of": ["two", "far"]}}
    path = recipe(tmp_path, case.base, stages, adapter={"method": "lora", "r": 4, "alpha": 8})
    case.ranks.call("tests.support.stages:run", recipe=str(path), stage="far", run_dir=str(case.run))
    batons = {name: handoff.open_baton(case.run / name) for name in ("two", "far")}
    context = Context(load(path), "bad", case.run, 0, 1, {}, batons)
    with pytest.raises(UserError, match=r"stages.bad.of: far stands on .*export.output and two on"):
        common_base(context, list(batons.values()))


@pytest.fixture(scope="module")
def packed(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same on a 4-bit base: two adapters, their sum, and that written out as a full model in float32."""
    folder = tmp_path_factory.mktemp("packed")
    stages = {name: STAGES[name] for name in ("one", "two", "linear")}
    stages["export"] = {"kind": "export", "policy": "linear", "dtype": "fp32"}
    stages = {name: {**block, "base": {"dtype": "bf16", "quantization": "nf4"}} for name, block in stages.items()}
    path = recipe(folder, tiny_llama, stages, adapter={"method": "lora", "r": 4, "alpha": 8})
    ranks(1).call("tests.support.stages:chain", recipe=str(path), run_dir=str(folder / "run"))
    return Case(ranks(1), path, folder / "run", tiny_llama)


def test_adapters_of_one_4_bit_base_are_added(packed: Case) -> None:
    """Factors are published in bfloat16, as they trained: each sum is off by half a unit in its last place, 2^-9, at most."""
    found = packed.factors("linear")
    for name, (a, b) in sides(packed).items():
        bound = 2 * 2.0**-8 * np.abs(sum(b)) @ np.abs(sum(a))
        assert (np.abs(change(found[name]) - sum(b) @ sum(a)) <= bound + 1e-9).all()
        assert np.abs(sum(b) @ sum(a)).max() > 0


def test_a_4_bit_policy_is_exported_dequantised(packed: Case) -> None:
    """Each adapted weight: bitsandbytes' own quantisation of the base's, taken back, and the adapter's change."""
    whole = AutoModelForCausalLM.from_pretrained(packed.run / "export" / "output", dtype="auto").state_dict()
    base = AutoModelForCausalLM.from_pretrained(packed.base, dtype=torch.bfloat16).state_dict()
    for name, factors in packed.factors("linear").items():
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        held, state = bnb.quantize_4bit(base[weight], quant_type="nf4", compress_statistics=True)
        taken_back = bnb.dequantize_4bit(held, state).float().numpy().astype(np.float64)
        np.testing.assert_allclose(
            whole[weight].float().numpy(), taken_back + change(factors), atol=1e-5, err_msg=weight
        )
        assert np.abs(taken_back - base[weight].float().numpy()).max() > 1e-3  # 4 bits are not the weights
