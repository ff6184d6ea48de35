"""dpo and kto on two ranks: against the papers' formulas on plain libraries' log-probabilities, under ZeRO, resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_methods import forget_after_the_first_step
from tests.support import preferences, tiny
from tests.support.methods import options
from tests.support.session import Ranks

Get = Callable[[int], Ranks]

RUN, CHAIN = "tests.support.stages:run", "tests.support.stages:chain"

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed": {"loss": "sigmoid", "label_smoothing": 0.2},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "sigmoid_norm": {"loss": "sigmoid_norm", "beta": 2.0},
    "simpo": {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.4},
    "cpo": {"loss": "cpo", "cpo_alpha": 0.5},
    "orpo": {"loss": "orpo", "beta": 0.25},
}


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def formula(name: str, now: np.ndarray, start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The loss of each pair, float64 [B], from log pi and log pi_ref of (chosen, rejected), [B, 2] each, and their tokens."""
    ratio, mean = now - start, now / lengths
    delta = 0.1 * (ratio[:, 0] - ratio[:, 1])
    odds = mean - np.log(1.0 - np.exp(mean))
    per_token = ratio / lengths
    return {
        "sigmoid": -log_sigmoid(delta),
        "smoothed": -0.8 * log_sigmoid(delta) - 0.2 * log_sigmoid(-delta),
        "robust": (-0.8 * log_sigmoid(delta) + 0.2 * log_sigmoid(-delta)) / 0.6,
        "hinge": np.maximum(0.0, 1.0 - delta),
        "ipo": (per_token[:, 0] - per_token[:, 1] - 1.0 / 0.2) ** 2,
        "sigmoid_norm": -log_sigmoid(2.0 * (per_token[:, 0] - per_token[:, 1])),
        "simpo": -log_sigmoid(2.0 * (mean[:, 0] - mean[:, 1]) - 0.4),
        "cpo": -log_sigmoid(0.1 * (now[:, 0] - now[:, 1])) - 0.5 * mean[:, 0],
        "orpo": -mean[:, 0] - 0.25 * log_sigmoid(odds[:, 0] - odds[:, 1]),
    }[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("preference") / "base", "llama_small")


@pytest.fixture(scope="module")
def run(ranks: Get, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sft, dpo with every loss, and kto with both."""
    folder = tmp_path_factory.mktemp("preference")
    stages: dict[str, dict[str, Any]] = {name: {"kind": "dpo", **more} for name, more in LOSSES.items()}
    stages |= {"kto": {"kind": "kto", "undesirable_weight": 1.5}, "apo": {"kind": "kto", "loss": "apo_zero_unpaired"}}
    stages = {name: {**block, "lr": 5e-2} for name, block in stages.items()}
    recipe = preferences.recipe(folder, base, stages)
    ranks(2).call(CHAIN, recipe=str(recipe), run_dir=str(folder / "run"))
    return folder / "run"


def published(run: Path, stage: str) -> dict[str, float]:
    return dict(json.loads((run / stage / "output" / "manifest.json").read_text())["metrics"])


def logged(run: Path, stage: str, name: str) -> list[float]:
    lines = map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("name", LOSSES)
def test_held_out_loss_of_pairs(run: Path, name: str) -> None:
    """After two steps at a high rate; the policy and its reference read from what was published, in plain PEFT."""
    rows = preferences.rows(run, name, "held_out")[:8]
    asked = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    start, now = (
        preferences.log_probs(preferences.policy(run / stage / "output"), asked).reshape(8, 2)
        for stage in ("sft", name)
    )
    assert np.abs(now - start).max() > 1.0
    lengths = np.array([len(reply) for _, reply in asked]).reshape(8, 2)
    metrics = published(run, name)
    assert metrics["held_out/loss"] == pytest.approx(formula(name, now, start, lengths).mean(), rel=2e-4)
    assert metrics["held_out/logps/chosen"] == pytest.approx(now[:, 0].mean(), rel=1e-4)
    reward = {"simpo": 2.0 * now / lengths, "cpo": 0.1 * now, "orpo": 0.25 * now / lengths}
    rewards = reward.get(name, LOSSES[name].get("beta", 0.1) * (now - start))
    assert metrics["held_out/rewards/margins"] == pytest.approx(
        (rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-3, abs=1e-4
    )
    assert metrics["held_out/rewards/accuracies"] == (rewards[:, 0] > rewards[:, 1]).mean()


@pytest.mark.parametrize("name", ["kto", "apo"])
def test_held_out_loss_of_replies(run: Path, name: str) -> None:
    """Two ranks read two rows each; the KL term is the mean over the four replies, each to the other row's prompt."""
    rows = preferences.rows(run, name, "held_out")[:8]
    other = [rows[number ^ 1] for number in range(8)]
    start, now = (
        (
            preferences.log_probs(model, [(row["prompt_ids"], row["completion_ids"]) for row in rows]),
            preferences.log_probs(
                model, [(row["prompt_ids"], o["completion_ids"]) for row, o in zip(rows, other, strict=True)]
            ),
        )
        for model in (preferences.policy(run / stage / "output") for stage in ("sft", name))
    )
    ratio, mismatched = now[0] - start[0], now[1] - start[1]
    kl = np.repeat(np.maximum(mismatched.reshape(2, 4).mean(1), 0.0), 4) if name == "kto" else np.zeros(8)
    good = np.array([row["label"] for row in rows])
    value = 1.0 / (1.0 + np.exp(-0.1 * np.where(good, ratio - kl, kl - ratio)))
    wanted = np.where(good, 1.0, 1.5 if name == "kto" else 1.0) * (1.0 - value)
    metrics = published(run, name)
    assert metrics["held_out/loss"] == pytest.approx(wanted.mean(), rel=2e-4)
    means = [0.1 * ratio[four][good[four]].mean() for four in (slice(4), slice(4, 8)) if good[four].any()]
    assert metrics["held_out/rewards/chosen"] == pytest.approx(np.mean(means), rel=1e-3)


@pytest.mark.parametrize(("name", "first"), [("sigmoid", np.log(2.0)), ("smoothed", np.log(2.0)), ("kto", None)])
def test_the_policy_starts_as_its_reference(run: Path, name: str, first: float | None) -> None:
    """log 2 is -log sigmoid(0); kto's replies have a value of one half each, times their weight."""
    found = logged(run, name, "loss")[0]
    assert found == pytest.approx(first, rel=1e-5) if first else 0.5 <= found <= 0.75
    assert abs(logged(run, name, "rewards/margins")[0]) < 1e-5


def test_gradient_of_a_batch(ranks: Get, base: Path, tmp_path: Path) -> None:
    """Two ranks, two micro-batches each, full fine-tuning: the norm is that of the mean loss of all eight rows."""
    stages = {name: {"kind": kind, **more, "steps": 1} for name, kind, more in GRADIENTS}
    for more in stages.values():
        more["init"] = "base"
    recipe = preferences.recipe(tmp_path, base, stages, data__holdout=0.0, adapter={"method": "full"})
    for kind in ("dpo", "kto"):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("\n".join(file.read_text().splitlines()[:8]))
    for name in stages:
        ranks(2).call(RUN, recipe=str(recipe), stage=name, run_dir=str(tmp_path / "run"))
        model = preferences.policy(base)
        loss(name, model, preferences.rows(tmp_path / "run", name, "train")).backward()
        squares = [p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None]
        norm = logged(tmp_path / "run", name, "grad_norm")[0]
        assert norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-4)


GRADIENTS: list[tuple[str, str, dict[str, Any]]] = [
    ("dpo", "dpo", {}),
    ("simpo", "dpo", {"loss": "simpo", "beta": 2.0}),
    ("kto", "kto", {}),
]


def loss(name: str, model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Where policy and reference are one, from plain log-probabilities."""
    assert len(rows) == 8
    losses = []
    for row in rows:
        sides = [side for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in row]
        said = [preferences.log_prob(model, row["prompt_ids"], row[side]) for side in sides]
        if name == "simpo":
            means = [2.0 * sum_ / len(row[side]) for sum_, side in zip(said, sides, strict=True)]
            losses.append(-torch.nn.functional.logsigmoid(means[0] - means[1] - 0.5))
        elif name == "dpo":
            ratio = said[0] - said[0].detach() - said[1] + said[1].detach()
            losses.append(-torch.nn.functional.logsigmoid(0.1 * ratio))
        else:
            ratio = 0.1 * (said[0] - said[0].detach())
            losses.append(1.0 - torch.sigmoid(ratio if row["label"] else -ratio))
    return torch.stack(losses).mean()


OFTEN = {"save_every": 1, "keep_checkpoints": 9}

BOTH, DPO = ("dpo", "kto"), ("dpo",)
CASES: list[tuple[str, int, tuple[str, ...], dict[str, Any]]] = [
    ("lora", 2, BOTH, {"lr_ratio": 4.0, "dropout": 0.1}),
    ("lora", 3, BOTH, {}),
    ("full", 2, BOTH, {}),
    ("full", 3, BOTH, {}),
    ("pissa", 2, DPO, {}),
    ("p_tuning", 2, DPO, {}),
    ("adalora", 2, DPO, {}),
]


@pytest.mark.parametrize(("method", "zero", "kinds", "more"), CASES)
def test_resumed(
    ranks: Get, base: Path, tmp_path: Path, method: str, zero: int, kinds: tuple[str, ...], more: dict[str, Any]
) -> None:
    """After the first step's checkpoint a killed stage publishes the same bytes, and reads its reference no second time; what
    the policy starts as is its reference; the published policy opens in plain PEFT."""
    steps = 4 if method == "adalora" else 2  # there must be one to prune in
    stages = {kind: {"kind": kind, **OFTEN, "steps": steps} for kind in kinds}
    changes = {"adapter": {**options(method), **more}, "deepspeed__config": f"zero{zero}", "stages__sft__steps": steps}
    recipe, run = preferences.recipe(tmp_path, base, stages, **changes), tmp_path / "run"
    hashes = ranks(2).call(CHAIN, recipe=str(recipe), run_dir=str(run))
    assert hashes[0] == hashes[1]
    for kind in stages:
        read = sorted((run / ".rows" / f"{kind}.data").glob("*/reference-*/*.npy"))
        before = [file.stat().st_mtime_ns for file in read]
        assert len(read) == 2
        assert logged(run, kind, "loss")[0] == pytest.approx(np.log(2.0) if kind == "dpo" else 0.5, rel=1e-4)
        forget_after_the_first_step(run / kind)
        again = ranks(2).call(RUN, recipe=str(recipe), stage=kind, run_dir=str(run))
        assert again == [hashes[0][kind]] * 2
        assert [file.stat().st_mtime_ns for file in read] == before
    rows = preferences.rows(run, "dpo", "held_out")[:8]
    now = preferences.log_probs(
        preferences.policy(run / "dpo" / "output"), [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    )
    assert published(run, "dpo")["held_out/logps/chosen"] == pytest.approx(now.mean(), rel=1e-4)


def test_what_the_reference_is_read_again_for(ranks: Get, base: Path, tmp_path: Path) -> None:
    """Not for another loss, beta or rate; for another policy. Stopped, evaluated and published best, the same bytes; ZeRO-3
    reads what ZeRO-2 reads."""
    stages = {"dpo": {"kind": "dpo", "eval_every": 1, "publish": "best", "keep_checkpoints": 9}}
    recipe = str(preferences.recipe(tmp_path, base, stages))
    run = tmp_path / "run"
    hashes = ranks(2).call(CHAIN, recipe=recipe, run_dir=str(run))[0]

    def reference() -> dict[str, int]:
        found = (run / ".rows" / "dpo.data").glob("*/reference-*/*.npy")
        return {f"{file.parent.name}/{file.name}": file.stat().st_mtime_ns for file in found}

    first = reference()
    values = {file.name: np.load(file) for file in (run / ".rows" / "dpo.data").glob("*/reference-*/*.npy")}
    asked = {"recipe": recipe, "stage": "dpo", "run_dir": str(run)}
    other = ["stages.dpo.loss=ipo", "stages.dpo.beta=0.3", "stages.dpo.lr=0.001"]
    assert ranks(2).call(RUN, **asked, overrides=other)[0] != hashes["dpo"]
    assert reference() == first

    shutil.rmtree(run / "dpo")
    (run / "dpo").mkdir()
    (run / "dpo" / "STOP").touch()
    assert ranks(2).call("tests.support.stages:stopped", **asked) == [True, True]
    (run / "dpo" / "STOP").unlink()
    assert ranks(2).call(RUN, **asked)[0] == hashes["dpo"]
    assert reference() == first

    for folder in (run / ".rows" / "dpo.data").glob("*/reference-*"):
        shutil.rmtree(folder)
    zero3 = ["stages.dpo.deepspeed.config=zero3", "stages.dpo.steps=1"]
    ranks(2).call(RUN, **asked, overrides=zero3)
    again = {file.name: np.load(file) for file in (run / ".rows" / "dpo.data").glob("*/reference-*/*.npy")}
    assert again.keys() == values.keys()
    for name, value in again.items():
        np.testing.assert_allclose(value, values[name], rtol=1e-4)

    ranks(2).call(CHAIN, recipe=recipe, run_dir=str(run), overrides=["stages.sft.lr=0.002"])
    assert not first.keys() & reference().keys()
