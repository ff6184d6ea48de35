"""PPO's estimators, stabilisers and reward sources in real runs: equal on one and two ranks, and each does what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_ppo_ranks import SGD
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
FUNCTION = {"function": "tests.distributed.option_cases:sevens"}


def sets(**values: Any) -> list[str]:
    """Overrides of the PPO stage: dots for __, values as YAML."""
    return [f"stages.ppo.{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]


@pytest.fixture(scope="module")
def published(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """SFT and two reward models, published: (recipe, run directory)."""
    folder = tmp_path_factory.mktemp("options")
    second = {
        "kind": "reward",
        "seed": 1,
        "data": [{"path": str(tiny.QUICKSTART / "preferences.jsonl")}],
        "steps": 2,
        "batch": 8,
        "lr": 1e-2,
    }
    recipe = str(tiny.recipe(folder / "tiny.yaml", tiny_llama, stages__second=second, stages__ppo__steps=2))
    run = str(folder / "run")
    for stage in ("sft", "reward", "second"):
        ranks(2).call("tests.support.stages:run", recipe=recipe, stage=stage, run_dir=run)
    return recipe, run


def facts(ranks: Get, published: tuple[str, str], world: int, steps: int = 1, **options: Any) -> dict[str, Any]:
    """See `option_cases.update_facts`."""
    return ranks(world).call(
        "tests.distributed.option_cases:update_facts",
        recipe=published[0],
        run_dir=published[1],
        overrides=sets(**options),
        steps=steps,
    )[0]


EVERYTHING = {
    "reward": [{"stage": ["reward", "second"], "combine": "mean_minus_std", "weight": 2.0}, FUNCTION],
    "normalize_scores": True,
    "critic": {"init": "policy", "lr": 0.05},
    "score_clip": 1.5,
    "overlong": {"buffer": 6, "penalty": 0.5},
    "missing_eos_penalty": 0.3,
    "entropy_coef": 0.05,
    "dual_clip": 3.0,
    "epochs": 2,
    "loss_aggregation": "sequence",
    "kl": {"coef": 0.1, "place": "loss"},
    "ptx": {"data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl")}], "batch": 8, "coef": 0.5},
}


@pytest.mark.parametrize(
    ("world", "zero", "options"),
    [
        (2, "zero2", {"advantage_estimator": "grpo", "samples_per_prompt": 4}),
        (2, "zero0", {"advantage_estimator": "rloo", "samples_per_prompt": 2}),
        (2, "zero1", {"advantage_estimator": "reinforce_pp"}),
        (2, "zero2", {"advantage_estimator": "remax"}),
        (2, "zero2", EVERYTHING),
        (2, "zero3", EVERYTHING),
        (2, "zero3", {**EVERYTHING, "gradient_checkpointing": True}),
        (
            2,
            "zero3",
            {"adapter": {"method": "full"}, "lr": 0.5, "critic": {"lr": 1.0}, "gradient_checkpointing": True},
        ),
    ],
    ids=["grpo", "rloo", "reinforce_pp", "remax", "everything-zero2", "everything-zero3", "recomputed", "full"],
)
def test_two_ranks_equal_one(
    ranks: Get, published: tuple[str, str], tmp_path: Path, world: int, zero: str, options: dict[str, Any]
) -> None:
    """Same tokens and advantages; the SGD step, which is the gradient times a constant, within 1e-5 relative. The output head
    reads some tokens at a time, as it does with a large vocabulary."""
    overrides = [*SGD, "stages.ppo.lr=20.0", *sets(**options)]
    found = {}
    for ranks_, config in ((1, "zero0"), (world, zero)):
        ranks(ranks_).call(
            "tests.distributed.cases:one_update",
            recipe=published[0],
            run_dir=published[1],
            overrides=[*overrides, f"deepspeed.config={config}"],
            target=str(tmp_path / f"{ranks_}.pt"),
            chunk=8192 if ranks_ > 1 else None,
        )
        found[ranks_] = torch.load(tmp_path / f"{ranks_}.pt", weights_only=False)
    one, two = found[1], found[world]
    assert one["tokens"] == two["tokens"]
    torch.testing.assert_close(one["advantages"], two["advantages"], rtol=0, atol=1e-5)
    assert one["change"].keys() == two["change"].keys()
    critic, samples = "advantage_estimator" not in options, options.get("samples_per_prompt", 1)
    if samples > 1:
        assert all(len({tuple(t) for t in one["tokens"][i : i + samples]}) > 1 for i in range(0, 8, samples))
    assert any("critic" in name for name in one["change"]) == critic
    policy, other = (
        ("trunks.policy.", "trunks.critic.") if "adapter" in options else (".policy.weight", ".critic.weight")
    )
    for role in [policy, *([other] if critic else [])]:
        ours, theirs = (
            torch.cat([c.flatten() for n, c in sorted(side["change"].items()) if role in n]) for side in (two, one)
        )
        assert theirs.abs().max() > 1e-3, "the update is too small to prove anything"
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, role


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_static_engine_changes_nothing(ranks: Get, published: tuple[str, str], tmp_path: Path, zero: str) -> None:
    """Two slots on each of two ranks, refilled as responses end, against `generate` on one rank: same tokens, same update."""
    found = {}
    for world, engine, config in ((1, "hf", "zero0"), (2, "static", zero)):
        sampling = {"engine": engine, "batch": 2, "max_prompt_length": 32, "max_response_length": 12}
        ranks(world).call(
            "tests.distributed.cases:one_update",
            recipe=published[0],
            run_dir=published[1],
            overrides=[*SGD, *sets(sampling=sampling), f"deepspeed.config={config}"],
            target=str(tmp_path / f"{engine}.pt"),
        )
        found[engine] = torch.load(tmp_path / f"{engine}.pt", weights_only=False)
    assert found["hf"]["tokens"] == found["static"]["tokens"]
    ours, theirs = (
        torch.cat([c.flatten() for _, c in sorted(found[side]["change"].items())]) for side in ("static", "hf")
    )
    assert theirs.abs().max() > 1e-2
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"advantage_estimator": "grpo", "samples_per_prompt": 2}, {**EVERYTHING, "ptx": None}],
    ids=["gae", "grpo", "everything"],
)
def test_gradient_does_not_see_order_cuts_and_padding(
    ranks: Get, published: tuple[str, str], options: dict[str, Any]
) -> None:
    """Property: permuted rows, other micro-batches, more columns of padding; the same gradient within 1e-5."""
    found = ranks(1).call(
        "tests.distributed.option_cases:invariant_gradients",
        recipe=published[0],
        run_dir=published[1],
        overrides=[*sets(**options), "stages.ppo.minibatches=1", "deepspeed.config=zero0"],
        examples=25,
    )[0]
    assert found["examples"] >= 20
    assert found["sizes"][".policy.weight"] > 1e-6
    assert found["worst"] < 1e-5


def test_estimators_without_a_critic_build_none(ranks: Get, published: tuple[str, str]) -> None:
    found = facts(ranks, published, 1, advantage_estimator="grpo", samples_per_prompt=2)
    assert found["roles"] == ["base", "policy", "reference", "reward"]
    assert found["groups"] == ["policy"]
    assert not {"loss/value_avg", "val/clipfrac_avg", "val/explained_variance"} & found["metrics"][0].keys()
    assert found["policy"] > 0


def test_target_kl_ends_the_update(ranks: Get, published: tuple[str, str]) -> None:
    """Four epochs of two minibatches. The first sees no change of the policy yet; the second does and is the last."""
    free = facts(ranks, published, 1, epochs=4, minibatches=2, warmup=0)
    assert free["metrics"][0]["policy/updates"] == 8
    held = facts(ranks, published, 1, epochs=4, minibatches=2, warmup=0, target_kl=1e-9)
    assert held["metrics"][0]["policy/updates"] == 2
    assert held["policy"] < free["policy"]


def test_actor_waits_for_the_critic(ranks: Get, published: tuple[str, str]) -> None:
    frozen = facts(ranks, published, 1, freezing_actor_steps=1, warmup=0)
    assert frozen["policy"] == 0.0
    assert frozen["critic"] > 1e-4
    assert frozen["metrics"][0]["lr/policy"] == 0.0
    after = facts(ranks, published, 1, steps=2, freezing_actor_steps=1, warmup=0, lr_schedule="constant")
    assert after["policy"] > 1e-4
    assert after["metrics"][1]["lr/policy"] == pytest.approx(1e-2)


def test_critic_has_a_schedule_of_its_own(ranks: Get, published: tuple[str, str]) -> None:
    """Two steps of two minibatches: the last update is number 3 of 4. Cosine to zero against a linear warm-up over 4."""
    options = {"lr_schedule": "cosine", "warmup": 0, "critic": {"lr": 0.5, "warmup": 4, "lr_schedule": "constant"}}
    last = facts(ranks, published, 1, steps=2, **options)["metrics"][1]
    assert last["lr/policy"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))
    assert last["lr/critic"] == pytest.approx(0.5 * 3 / 4)


@pytest.mark.parametrize(
    ("dtype", "zero"), [("fp32", "zero2"), ("bf16", "zero0"), ("bf16", "zero2"), ("bf16", "zero3")]
)
def test_average_is_of_the_masters(ranks: Get, published: tuple[str, str], dtype: str, zero: str) -> None:
    """Decay 0.5 over two steps: 0.25 w0 + 0.25 w1 + 0.5 w2, in float32 and from float32, on rank 0 alone."""
    main, other = ranks(2).call(
        "tests.distributed.option_cases:averaged",
        recipe=published[0],
        run_dir=published[1],
        overrides=[*sets(ema_decay=0.5, warmup=0), f"base.dtype={dtype}", f"deepspeed.config={zero}"],
    )
    assert other == {"ranks": 0}
    assert main["dtypes"] == ["torch.float32"]
    assert main["moved"] > 1e-3
    assert main["error"] < 1e-7


@pytest.mark.parametrize(
    ("where", "zero", "dtype"),
    [
        ("weights", "zero2", "fp32"),
        ("gradient", "zero0", "fp32"),
        ("gradient", "zero1", "bf16"),
        ("gradient", "zero2", "bf16"),
        ("gradient", "zero3", "fp32"),
    ],
)
def test_not_finite_stops_before_any_weight_moves(
    ranks: Get, published: tuple[str, str], tmp_path: Path, where: str, zero: str, dtype: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for stage in ("sft", "reward", "second"):
        (run / stage).symlink_to(Path(published[1]) / stage)
    answers = ranks(2).call(
        "tests.distributed.option_cases:trouble",
        recipe=published[0],
        run_dir=str(run),
        overrides=[f"base.dtype={dtype}", f"deepspeed.config={zero}"],
        where=where,
    )
    for found in answers:
        assert "stage ppo, step 1: " in found["message"]
        assert "not finite" in found["message"]
        assert ("reward source reward, row 0: its score is nan" if where == "weights" else "gradient") in found[
            "message"
        ]
        assert str(run / "ppo" / "trouble" / "step-1.pt") in found["message"]
        assert found["moved"] == 0.0
    expected = {"tokens", "lengths"} | ({"scores", "logprobs", "advantages"} if where == "gradient" else set())
    assert expected <= set(answers[0]["saved"])


def run_ppo(ranks: Get, published: tuple[str, str], folder: Path, *, world: int = 2, **options: Any) -> Path:
    """The PPO stage's folder after a run of its own over the published parents."""
    for stage in ("sft", "reward", "second"):
        if not (folder / stage).exists():
            (folder / stage).symlink_to(Path(published[1]) / stage)
    ranks(world).call(
        "tests.support.stages:run", recipe=published[0], stage="ppo", run_dir=str(folder), overrides=sets(**options)
    )
    return folder / "ppo"


def rows(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def test_the_average_is_what_is_published(ranks: Get, published: tuple[str, str], tmp_path: Path) -> None:
    stage = run_ppo(ranks, published, tmp_path, ema_decay=0.9, publish="ema")
    average = load_file(stage / "checkpoints" / "step-2" / "ema.safetensors")
    output = load_file(stage / "output" / "adapter_model.safetensors")
    assert len(output) == len(average) > 0
    for name, weights in average.items():
        assert torch.equal(output[name.replace(".policy.", ".")], weights)
    state = torch.load(stage / "checkpoints" / "step-2" / "engine" / "mp_rank_00_model_states.pt", weights_only=False)
    last = {n.removeprefix("trunks.policy."): w for n, w in state["module"].items()}
    assert max(float((last[name] - weights).abs().max()) for name, weights in average.items()) > 1e-4


def test_everything_a_run_remembers_is_resumed(ranks: Get, published: tuple[str, str], tmp_path: Path) -> None:
    """Average, running scores, KL coefficient, signals and the supervised rows' stream: stopped after one step and resumed,
    every published file is that of an undisturbed run, and so are the metrics."""
    options = {
        **EVERYTHING,
        "ema_decay": 0.9,
        "publish": "ema",
        "kl": {"coef": 0.1, "target": 1.0, "horizon": 100},
        "eval_every": 1,
        "gold": [FUNCTION],
        "signals": {"patience": 2, "truncated_responses": 0.01},
    }
    runs = [tmp_path / "undisturbed", tmp_path / "resumed"]
    for run in runs:
        run.mkdir()
    undisturbed = run_ppo(ranks, published, runs[0], **options)
    for stage in ("sft", "reward", "second"):
        (runs[1] / stage).symlink_to(Path(published[1]) / stage)
    ends = ranks(2).call(
        "tests.distributed.option_cases:stopped_and_resumed",
        recipe=published[0],
        run_dir=str(runs[1]),
        overrides=sets(**options),
    )
    assert ends == [["stopped", "published"]] * 2
    files = sorted(p.name for p in (undisturbed / "output").iterdir())
    assert "adapter_model.safetensors" in files
    for name in files:
        ours, theirs = ((run / "ppo" / "output" / name).read_bytes() for run in runs)
        assert ours == theirs, name
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per"))} for row in rows(run / "ppo")]
        for run in runs
    )
    assert ours == theirs
    assert theirs[-2]["signals/truncated_responses"] == 1.0, "it holds for two steps, one of them before the stop"


def test_sources_are_weighted_and_told_apart(ranks: Get, published: tuple[str, str], tmp_path: Path) -> None:
    """reward = 2 x minimum of two reward models + 3 x the function; the gold score is watched on held-out prompts."""
    sources = [
        {"stage": ["reward", "second"], "combine": "min", "weight": 2.0},
        {"stage": "reward", "weight": 0.0},
        {"stage": "second", "weight": 0.0},
        {**FUNCTION, "weight": 3.0},
    ]
    stage = run_ppo(ranks, published, tmp_path, reward=sources, gold=[FUNCTION], eval_every=1)
    found = [row for row in rows(stage) if "objective/scores" in row]
    names = ("reward+second", "reward", "second", "function:tests.distributed.option_cases:sevens")
    for row in found:
        low, first, second, function = (row[f"objective/scores/{name}"] for name in names)
        assert row["objective/scores"] == pytest.approx(2 * low + 3 * function, rel=1e-5)
        assert low <= min(first, second) + 1e-6
        assert function > 0
    evaluations = [row for row in rows(stage) if "eval/gold" in row]
    assert [row["step"] for row in evaluations] == [1, 2]
    assert all(row["eval/gold_std"] > 0 for row in evaluations)


def test_skipped_batches_are_counted_and_teach_nothing(ranks: Get, published: tuple[str, str], tmp_path: Path) -> None:
    """Nobody listens on that port: with `on_failure: skip` both batches are left out and the policy is the parent's."""
    dead = {"http": "http://127.0.0.1:9/score", "retries": 0, "timeout": 2.0, "on_failure": "skip"}
    options = {"reward": [dead], "critic": {"init": "policy"}}
    # Held-out evaluation would ask the endpoint too; there is no score to report without it.
    stage = run_ppo(ranks, published, tmp_path, **options, eval_rows=1)
    assert [row["skipped_batches"] for row in rows(stage)] == [1.0, 2.0]
    ours, theirs = (
        load_file(folder / "output" / "adapter_model.safetensors") for folder in (stage, Path(published[1]) / "sft")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    manifest = json.loads((stage / "output" / "manifest.json").read_text())
    assert manifest["metrics"]["skipped_batches"] == 2.0


def test_signal_stops_the_run(ranks: Get, published: tuple[str, str], tmp_path: Path) -> None:
    """The KL exceeds its budget once the policy moves; the third step running ends the training. What is left to resume is
    the checkpoint of the last step at which it did not, although one checkpoint is all that is kept otherwise."""
    with pytest.raises(AssertionError, match=r"kl_budget: .* \(the recipe stops on kl_budget\)") as error:
        run_ppo(
            ranks,
            published,
            tmp_path,
            steps=8,
            lr=0.1,
            warmup=0,
            save_every=1,
            keep_checkpoints=1,
            signals={"patience": 3, "kl_budget": 1e-3, "stop_on": ["kl_budget"]},
        )
    assert "Trouble" in str(error.value)
    assert not (tmp_path / "ppo" / "output").exists()
    kls = [row["objective/kl"] for row in rows(tmp_path / "ppo")]
    assert abs(kls[0]) < 1e-5, "nothing had moved yet"
    began = next(step for step in range(2, 9) if all(kl > 1e-3 for kl in kls[step - 1 : step + 2]))
    assert f"stage ppo, step {began + 2}: " in str(error.value)
    left = sorted(p.name for p in (tmp_path / "ppo" / "checkpoints").glob("step-*"))
    assert [name for name in left if not name.endswith(".suspect")] == [f"step-{began - 1}"], "the last good one"


def test_prompts_and_responses_must_fit_the_context(ranks: Get, published: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"is 129 tokens, and the policy's context holds 128"):
        run_ppo(ranks, published, tmp_path, sampling={"max_prompt_length": 32, "max_response_length": 97})
