"""Every method under every ZeRO stage on two ranks as one process trains it, and through the whole chain."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.config.methods import METHODS
from tests.support import tiny
from tests.support.methods import FAMILIES, changes, fits
from tests.support.session import Ranks

Get = Callable[[int], Ranks]

ALONE = [m for m in METHODS if m not in ("full", "qlora")]
"""Methods on whole weights."""

NF4 = {"base__quantization": "nf4", "base__dtype": "bf16"}
CHAINS: list[tuple[str, int, dict[str, Any]]] = [
    ("dora", 1, {}),
    ("pissa", 3, {}),
    ("vera", 2, {}),
    ("ia3", 3, {}),
    ("oft", 1, {}),
    ("ln_tuning", 2, {}),
    ("bitfit", 3, {}),
    ("p_tuning", 2, {}),
    ("mam", 3, {"stages__reward__adapter": {"method": "lora", "r": 4}}),  # PEFT puts the two on copies of their own
    ("unipelt", 1, {}),
    ("loreft", 2, {}),
    ("adalora", 1, NF4),
]
"""A method of each kind of adapter, a ZeRO stage, and what else the recipe says; all of both are in `scripts/matrix.py`."""


ONE_BLOCK = {"qwen2": {"num_hidden_layers": 1}, "opt": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}
"""Under ZeRO-3 each weight is fetched by itself; what Llama's two blocks show need not be shown again."""


class Alone(NamedTuple):
    """What one process without ZeRO makes of each method's adapter on a base."""

    family: str
    base: Path
    adapters: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request: pytest.FixtureRequest, ranks: Get, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    family, folder = request.param, tmp_path_factory.mktemp("alone")
    base = tiny.model(folder / "base", family, **ONE_BLOCK.get(family, {}))
    methods = [method for method in ALONE if fits(method, family)]
    return Alone(family, base, trained(ranks, 1, base, methods, 0, folder))


def trained(ranks: Get, world: int, base: Path, methods: list[str], stage: int, folder: Path, **more: Any) -> Any:
    target = folder / f"zero{stage}.pt"
    asked = {"base": str(base), "methods": methods, "stage": stage, "target": str(target), **more}
    ranks(world).call("tests.distributed.method_cases:train", **asked)
    return torch.load(target)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_train_what_one_process_trains(ranks: Get, tmp_path: Path, alone: Alone, stage: int) -> None:
    """On two ranks under every ZeRO stage, on every family, whatever can be there: three steps. Llama has two blocks, the
    others one."""
    methods = [m for m in alone.adapters if stage < 3 or METHODS[m].zero3]
    for method, found in trained(ranks, 2, alone.base, methods, stage, tmp_path).items():
        assert found.keys() == alone.adapters[method].keys()
        for name, value in alone.adapters[method].items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda m: f"{method} {name}: {m}")  # noqa: B023


def test_ranks_train_on_packed_weights_what_one_process_trains(ranks: Get, tmp_path: Path) -> None:
    """In 4 bits under ZeRO-3, a method of each kind of adapter of which that is claimed: the same change of the adapter but
    for bf16's rounding."""
    methods = ["qlora", "adalora", "vera", "oft", "bitfit", "unipelt", "p_tuning", "loreft"]
    able = [m for m in METHODS.values() if m.peft and m.four_bit and m.zero3 and m.four_bit_zero3]
    assert {METHODS[method].peft for method in methods} == {method.peft for method in able}
    base = tiny.model(tmp_path / "base", **tiny.WIDE["llama"])
    start = trained(ranks, 1, base, methods, 0, tmp_path, packed=True, steps=0)
    alone = trained(ranks, 1, base, methods, 0, tmp_path, packed=True)
    together = trained(ranks, 2, base, methods, 3, tmp_path, packed=True)
    for method in methods:
        before, one, two = (
            torch.cat([found[method][name].flatten().float() for name in sorted(start[method])])
            for found in (start, alone, together)
        )
        assert float((two - one).norm() / (one - before).norm()) < 0.1, method


OFTEN = {"steps": 2, "save_every": 1, "keep_checkpoints": 9}

RESUMED = ("pissa", "vera", "mam", "p_tuning", "loreft")
"""Methods that start from more than zeros: components of the base, random factors, networks, orthonormal rows."""


@pytest.mark.parametrize(("method", "zero", "more"), CHAINS)
def test_chain(ranks: Get, tiny_llama: Path, tmp_path: Path, method: str, zero: int, more: dict[str, Any]) -> None:
    """SFT, reward model and PPO; what they publish reads the same in plain PEFT; gone on with after their first step, SFT and
    PPO publish the same bytes."""
    resumed = ("sft", "ppo") if method in RESUMED else ()
    often = {f"stages__{stage}__{key}": value for stage in resumed for key, value in OFTEN.items()}
    recipe = str(tiny.recipe(tmp_path / "r.yaml", tiny_llama, **{**changes(method, zero), **often, **more}))
    asked = {"recipe": recipe, "run_dir": str(tmp_path / "run")}
    hashes = ranks(2).call("tests.support.stages:chain", **asked)
    assert hashes[0] == hashes[1]
    for difference in ranks(2).call("tests.distributed.cases:opens_plainly", **asked):
        assert max(difference.values()) <= (0.05 if more is NF4 else 2e-5), difference
    for stage in resumed:
        forget_after_the_first_step(tmp_path / "run" / stage)
        again = ranks(2).call("tests.support.stages:run", stage=stage, **asked)
        assert again[0] == hashes[0][stage]


def forget_after_the_first_step(stage: Path) -> None:
    """Leave of a stage what a kill after its first step's checkpoint would have left."""
    shutil.rmtree(stage / "output")
    for folder in (stage / "checkpoints").glob("*-*"):
        if folder.is_dir() and not folder.name.endswith("-1"):
            shutil.rmtree(folder)
