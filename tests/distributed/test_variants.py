"""The ways a chain can be put together: bases of different sizes, parents of another method, where roles start, other
architectures, recomputed activations, micro-batches, early stopping, margins, added pads, offloading, the wheel."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.handoff import read_manifest
from pipeline.model.load import ADDED_PAD, PAD_NAMES
from tests.distributed.test_ppo_ranks import SGD
from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]
ADAPTER = "adapter_model.safetensors"
SHORT = {
    "stages__sft__steps": 2,
    "stages__reward__steps": 2,
    "stages__ppo__steps": 2,
    "stages__ppo__sampling__max_response_length": 8,
}
FULL = ["stages.ppo.adapter.method=full", "stages.ppo.lr=1.0e-3"]


class Case:
    """A recipe and a run directory of its own; `copy` forks both the published stages and nothing else."""

    def __init__(self, ranks: Get, recipe: Path, run: Path) -> None:
        self.ranks, self.recipe, self.dir = ranks, str(recipe), run

    def run(self, stage: str, *overrides: str, world: int = 1) -> Path:
        """The published output of `stage`."""
        self.call("tests.support.stages:run", stage=stage, overrides=list(overrides), world=world)
        return self.dir / stage / "output"

    def call(self, function: str, *, world: int = 1, **arguments: Any) -> Any:
        """Rank 0's answer."""
        return self.ranks(world).call(function, recipe=self.recipe, run_dir=str(self.dir), **arguments)[0]

    def copy(self, folder: Path) -> Case:
        shutil.copytree(self.dir, folder / "run", ignore=shutil.ignore_patterns("checkpoints*"))
        return Case(self.ranks, Path(self.recipe), folder / "run")

    def update(self, folder: Path, name: str, *overrides: str, world: int = 1) -> dict[str, Any]:
        """One PPO update from the published parents; see `cases.one_update`."""
        self.call(
            "tests.distributed.cases:one_update",
            overrides=[*SGD, *overrides],
            target=str(folder / name),
            world=world,
        )
        return dict(torch.load(folder / name, weights_only=False))

    def rows(self, stage: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.dir / stage / "metrics.jsonl").read_text().splitlines()]

    def manifest(self, stage: str) -> dict[str, Any]:
        found = read_manifest(self.dir / stage)
        assert found is not None
        return found

    def opens(self, *overrides: str) -> dict[str, float]:
        """How far plain transformers and PEFT are from Relay on each published stage. Sets the stage's metrics aside."""
        return dict(self.call("tests.distributed.cases:opens_plainly", overrides=list(overrides)))

    def assert_reference_is_the_start(self) -> None:
        first = next(row for row in self.rows("ppo") if "objective/kl" in row)
        assert first["step"] == 1
        assert abs(first["objective/kl"]) < 1e-5, "the rollout rounds otherwise than the training forward"
        assert first["objective/entropy"] != 0.0


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], role: str) -> float:
    """Relative distance of two updates of a role; refuses one that is too small to prove anything."""
    left, right = (
        torch.cat([c.flatten() for n, c in sorted(side.items()) if role in n or role == "*"]) for side in (ours, theirs)
    )
    assert right.abs().max() > 1e-3, "the update is too small to prove anything"
    return float((left - right).norm() / right.norm())


@pytest.fixture(scope="module")
def lora(ranks: Get, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """SFT and reward model with LoRA, published."""
    folder = tmp_path_factory.mktemp("lora")
    case = Case(ranks, tiny.recipe(folder / "tiny.yaml", tiny_llama, rows=None, **SHORT), folder / "run")
    case.call("tests.support.stages:chain", until="reward")
    return case


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("small") / "model", "llama_small", seed=1)


@pytest.fixture(scope="module")
def two_sizes(lora: Case, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same SFT beside a reward model on a smaller base."""
    case = lora.copy(tmp_path_factory.mktemp("sizes"))
    recipe = tiny.recipe(
        case.dir.parent / "sizes.yaml",
        Path(json.loads((lora.dir / "sft/output/adapter_config.json").read_text())["base_model_name_or_path"]),
        stages__reward__base={"model": str(small)},
        **SHORT,
    )
    case.recipe = str(recipe)
    case.run("reward")
    return case


@pytest.mark.parametrize("overrides", [[], FULL], ids=["lora", "full"])
def test_reward_model_of_another_size(two_sizes: Case, tmp_path: Path, overrides: list[str]) -> None:
    case = two_sizes.copy(tmp_path)
    output = case.run("ppo", *overrides, world=2)
    assert case.manifest("reward")["base"]["content_hash"] != case.manifest("sft")["base"]["content_hash"]
    assert (output / ADAPTER).exists() == (not overrides)
    case.assert_reference_is_the_start()
    assert max(case.opens(*overrides).values()) <= 2e-5


def merged_base(stage: Path, parent: str) -> Path:
    """The one full model that `stage` made of `parent`'s adapter."""
    (found,) = stage.glob(f"base-of-{parent}-*")
    return found


def test_full_from_adapters(lora: Case, tmp_path: Path) -> None:
    """Parents are merged into full models first, and merging changes no logit."""
    case = lora.copy(tmp_path)
    output = case.run("ppo", *FULL)
    merged = merged_base(case.dir / "ppo", "sft")
    assert merged_base(case.dir / "ppo", "reward").is_dir()
    assert case.manifest("ppo")["base"]["model"] == str(merged)
    assert not (output / ADAPTER).exists()
    adapter = case.dir / "sft" / "output"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        without = plain(input_ids=tokens).logits
        together = PeftModel.from_pretrained(plain, str(adapter)).eval()(input_ids=tokens).logits
        once = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=tokens).logits
    assert (together - without).abs().max() > 1e-2, "the adapter does nothing"
    assert (once - together).abs().max() <= 1e-5
    before, after = load_file(merged / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    case.assert_reference_is_the_start()
    assert max(case.opens(*FULL).values()) <= 2e-5


def test_lora_from_full_parents(lora: Case, tmp_path: Path) -> None:
    """A fresh adapter on the full SFT model, another on the full reward model; the reference is the adapter turned off."""
    case = Case(lora.ranks, Path(lora.recipe), tmp_path / "run")
    for stage in ("sft", "reward"):
        case.run(stage, "adapter.method=full", f"stages.{stage}.lr=1.0e-3")
    output = case.run("ppo")
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(case.dir / "sft" / "output")
    assert not list((case.dir / "ppo").glob("base-of-*")), "a full parent needs no merging"
    assert any(w.abs().max() > 0 for n, w in load_file(output / ADAPTER).items() if "lora_B" in n)
    case.assert_reference_is_the_start()
    assert max(case.opens().values()) <= 2e-5


def test_lora_of_another_rank(lora: Case, tmp_path: Path) -> None:
    """An adapter of another shape is merged, not stacked: the new one stands on the merged model."""
    case, overrides = lora.copy(tmp_path), ["stages.ppo.adapter.r=2"]
    output = case.run("ppo", *overrides, world=2)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["base_model_name_or_path"] == str(merged_base(case.dir / "ppo", "sft"))
    case.assert_reference_is_the_start()
    assert max(case.opens(*overrides).values()) <= 2e-5


def test_policy_continues_the_sft_adapter(lora: Case, tmp_path: Path) -> None:
    """The reference is a frozen copy of the SFT adapter: no KL at first, some after a step."""
    case = lora.copy(tmp_path)
    case.run("ppo")
    case.assert_reference_is_the_start()
    assert case.rows("ppo")[-1]["objective/kl"] != 0.0
    base = json.loads((case.dir / "ppo/output/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == json.loads((case.dir / "sft/output/adapter_config.json").read_text())["base_model_name_or_path"]


def test_policy_from_the_base(lora: Case, tmp_path: Path) -> None:
    """A fresh adapter is the identity: the reference is the base with the adapter off."""
    case = lora.copy(tmp_path)
    case.run("ppo", "stages.ppo.policy=base")
    case.assert_reference_is_the_start()
    assert set(case.manifest("ppo")["parents"]) == {"reward"}


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_reward_continues_the_sft_adapter(lora: Case, tmp_path: Path, zero: str) -> None:
    """With a learning rate of nothing, the reward model's adapter is the SFT's."""
    case = lora.copy(tmp_path)
    still = ["stages.reward.init=sft", "stages.reward.steps=1", "stages.reward.lr=1.0e-12", "stages.reward.warmup=0"]
    ours = load_file(case.run("reward", *still, f"deepspeed.config={zero}", world=2) / ADAPTER)
    theirs = load_file(case.dir / "sft" / "output" / ADAPTER)
    assert {n for n in ours if "lora_" in n} == theirs.keys()
    assert max(float(w.abs().max()) for n, w in theirs.items() if "lora_B" in n) > 1e-3
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_full_reward_from_the_sft_adapter(lora: Case, tmp_path: Path, zero: str) -> None:
    """A full reward model that starts from the SFT adapter starts from the merged policy."""
    case = lora.copy(tmp_path)
    output = case.run(
        "reward",
        "stages.reward.init=sft",
        "stages.reward.adapter.method=full",
        "stages.reward.steps=1",
        "stages.reward.lr=1.0e-12",
        "stages.reward.warmup=0",
        f"deepspeed.config={zero}",
        world=2,
    )
    ours = load_file(output / "model.safetensors")
    theirs = load_file(merged_base(case.dir / "reward", "sft") / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(ours[layer], theirs[layer], rtol=0, atol=1e-9)
    base = Path(case.manifest("sft")["base"]["model"])
    assert (theirs[layer] - load_file(base / "model.safetensors")[layer]).abs().max() > 1e-4


@pytest.mark.parametrize("init", ["reward", "policy", "base"])
def test_critic_init(lora: Case, tmp_path: Path, init: str) -> None:
    case = lora.copy(tmp_path)
    found = case.call("tests.distributed.variant_cases:critic_start", overrides=[f"stages.ppo.critic.init={init}"])
    assert (found["to_policy"] == 0.0) == (init == "policy")
    assert (found["to_reward"] == 0.0) == (init == "reward")
    assert (found["output_weight"] == 0.0) == (init == "base"), "a fresh adapter is the identity"
    assert (found["head_to_reward"] == 0.0) == (init == "reward")
    assert found["head"] > 0.0


@pytest.mark.parametrize("zero", [0, 3])
def test_a_head_on_the_policy_is_a_critic(lora: Case, tmp_path: Path, zero: int) -> None:
    """It trains its head alone, and the policy's update is the same at any rate of the critic's."""
    case = lora.copy(tmp_path)
    same = [
        "stages.ppo.whiten=false",
        "stages.ppo.lam=1.0",
        "stages.ppo.critic.init=policy",
        f"deepspeed.config=zero{zero}",
    ]
    found = case.update(tmp_path, "head.pt", *same, "stages.ppo.critic.kind=head", world=2)
    scaled = case.update(
        tmp_path, "scaled.pt", *same, "stages.ppo.critic.kind=head", "stages.ppo.critic.lr=3.0", world=2
    )
    trained = {name for name, change in found["change"].items() if change.abs().max() > 0}
    assert {name for name in trained if ".policy." not in name} == {"heads.critic.weight"}
    assert any(".policy." in name for name in trained)
    for name, change in found["change"].items():
        if ".policy." in name:
            assert torch.equal(change, scaled["change"][name]), "the critic's update reaches the policy"
    assert not torch.equal(found["change"]["heads.critic.weight"], scaled["change"]["heads.critic.weight"])


def test_a_critic_of_its_own_weights(lora: Case, tmp_path: Path) -> None:
    """All of them train, beside an adapter for the policy; they start as the policy's or the reward model's, merged."""
    case = lora.copy(tmp_path)
    for init in ("policy", "reward", "base"):
        overrides = ["stages.ppo.critic.kind=model", f"stages.ppo.critic.init={init}", "stages.ppo.critic.lr=0.1"]
        found = case.update(tmp_path, f"{init}.pt", *overrides, world=2)
        trained = {name for name, change in found["change"].items() if change.abs().max() > 0}
        assert "trunks.critic.model.layers.0.mlp.up_proj.weight" in trained
        assert not any("lora" in name and ".critic." in name for name in found["change"])
        if init == "base":
            below = Path(case.manifest("sft")["base"]["model"])
        else:
            below = merged_base(case.dir / "ppo", {"policy": "sft", "reward": "reward"}[init])
        name = "model.layers.0.mlp.up_proj.weight"
        before = found["after"][f"trunks.critic.{name}"] - found["change"][f"trunks.critic.{name}"]
        torch.testing.assert_close(before, load_file(below / "model.safetensors")[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_roles_read_together_what_they_read_alone(lora: Case, tmp_path: Path, zero: int) -> None:
    """Four roles on one trunk in one pass, each row with its role's adapter."""
    case = lora.copy(tmp_path)
    found = case.call(
        "tests.distributed.variant_cases:read_together",
        overrides=[*SGD, "stages.ppo.lr=5.0", f"deepspeed.config=zero{zero}"],
        world=2,
    )
    assert found.pop("policy to reference") > 1e-3, "the adapters do not differ"
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_rollouts_by_a_merged_copy_are_the_same(lora: Case, tmp_path: Path, zero: int) -> None:
    """Tokens, and within 1e-4 the update: by layers gathered one by one and by a whole copy; ranks end at different steps."""
    case = lora.copy(tmp_path)
    found = {
        name: case.update(
            tmp_path, f"{name}.pt", f"deepspeed.config=zero{zero}", f"stages.ppo.sampling.adapter={name}", world=2
        )
        for name in ("merged", "unmerged")
    }
    assert found["merged"]["tokens"] == found["unmerged"]["tokens"]
    for role in (".policy.weight", ".critic.weight", "heads.critic"):
        assert close(found["merged"]["change"], found["unmerged"]["change"], role) < 1e-4, role


@pytest.mark.parametrize("shape", ["opt", "gpt2", "gpt_neox", "qwen2"])
def test_architecture(ranks: Get, tmp_path: Path, shape: str) -> None:
    """Rollout and training agree on log-probabilities, and what is published opens without Relay."""
    base = tiny.model(tmp_path / "base", shape)
    # transformers reads a Qwen2 folder with its own tokenizer class, which spells these words letter by letter.
    long = {"stages__ppo__sampling__max_prompt_length": 96}
    case = Case(ranks, tiny.recipe(tmp_path / "tiny.yaml", base, **SHORT, **long), tmp_path / "run")
    case.call("tests.support.stages:chain", until="reward")
    differences = case.call("tests.distributed.variant_cases:ppo_and_canary", overrides=[])
    assert differences, "the canary did not look"
    assert max(differences) <= 1e-4
    case.assert_reference_is_the_start()
    assert max(case.opens().values()) <= 2e-5


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(lora: Case, tmp_path: Path, zero: str, method: str) -> None:
    """Actor and critic switch adapters between forward and backward; their gradients must not vanish for it."""
    case = lora.copy(tmp_path)
    overrides = [f"deepspeed.config={zero}"]
    if method == "full":
        overrides += [*FULL[:1], "stages.ppo.lr=1.0", "stages.ppo.critic.lr=0.1"]
    plain = case.update(tmp_path, "plain.pt", *overrides, world=2)
    again = case.update(tmp_path, "again.pt", *overrides, "stages.ppo.gradient_checkpointing=true", world=2)
    assert plain["tokens"] == again["tokens"]
    roles = ("trunks.policy.", "trunks.critic.") if method == "full" else (".policy.weight", ".critic.weight")
    for role in (*roles, "heads.critic"):
        assert close(again["change"], plain["change"], role) < 1e-4, role


def test_micro_batches_change_nothing(lora: Case, tmp_path: Path) -> None:
    """Same minibatches in the same order, same update, however they are cut."""
    found = {}
    for micro in (1, 4):
        target = tmp_path / f"{micro}.pt"
        order = lora.call(
            "tests.distributed.variant_cases:recorded_update",
            overrides=[
                *SGD,
                "stages.ppo.lr=5.0",
                "stages.ppo.critic.lr=0.5",
                "stages.ppo.minibatches=2",
                f"stages.ppo.micro_batch={micro}",
            ],
            target=str(target),
        )
        assert [len(part) for part in order] == [micro] * (8 // micro)
        found[micro] = ([row for part in order for row in part], torch.load(target, weights_only=False))
    (one_order, one), (four_order, four) = found[1], found[4]
    assert one_order == four_order
    assert sorted(one_order) == list(range(8))
    assert one["tokens"] == four["tokens"]
    for role in (".policy.weight", ".critic.weight"):
        assert close(one["change"], four["change"], role) < 1e-5, role


def test_sft_stops_early_and_publishes_the_best(lora: Case, tmp_path: Path) -> None:
    case = Case(lora.ranks, Path(lora.recipe), tmp_path / "run")
    output = case.run(
        "sft",
        "stages.sft.steps=12",
        "stages.sft.lr=0.1",
        "stages.sft.lr_schedule=constant",
        "stages.sft.warmup=0",
        "stages.sft.eval_every=1",
        "stages.sft.early_stopping=2",
        "stages.sft.publish=best",
        "stages.sft.save_every=null",
    )
    losses = {int(row["step"]): row["eval_loss"] for row in case.rows("sft") if "eval_loss" in row}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert best < last < 12, losses
    assert last == best + 2
    checkpoints = case.dir / "sft" / "checkpoints"
    _assert_published(
        load_file(output / ADAPTER), *(load_file(checkpoints / f"checkpoint-{n}" / ADAPTER) for n in (best, last))
    )
    assert case.manifest("sft")["metrics"]["held_out/loss"] == pytest.approx(losses[best], rel=1e-6)


def test_ppo_stops_early_and_publishes_the_best(lora: Case, tmp_path: Path) -> None:
    case = lora.copy(tmp_path)
    output = case.run(
        "ppo",
        "stages.ppo.steps=10",
        "stages.ppo.lr=0.3",
        "stages.ppo.lr_schedule=constant",
        "stages.ppo.warmup=0",
        "stages.ppo.eval_every=1",
        "stages.ppo.early_stopping=2",
        "stages.ppo.publish=best",
    )
    scores = {int(row["step"]): row["eval/score"] for row in case.rows("ppo") if "eval/score" in row}
    best, last = max(scores, key=lambda step: scores[step]), max(scores)
    assert best < last < 10, scores
    assert last == best + 2
    saved = []
    for step in (best, last):
        file = case.dir / "ppo" / "checkpoints" / f"step-{step}" / "engine" / "mp_rank_00_model_states.pt"
        module = torch.load(file, weights_only=False)["module"]
        named = {n.removeprefix("trunks.policy.").replace(".policy.", "."): w for n, w in module.items()}
        saved.append({n: w for n, w in named.items() if "lora_" in n and ".critic." not in n})
    _assert_published(load_file(output / ADAPTER), *saved)
    assert case.manifest("ppo")["metrics"]["eval/score"] == pytest.approx(scores[best], rel=1e-6)


def _assert_published(
    published: dict[str, torch.Tensor], best: dict[str, torch.Tensor], last: dict[str, torch.Tensor]
) -> None:
    """The published weights are the best checkpoint's, and those of the last are others."""
    assert published.keys() == best.keys()
    assert all(torch.equal(published[name], best[name]) for name in published)
    assert any(not torch.equal(published[name], last[name]) for name in published)


def test_margin_and_center(ranks: Get, tiny_llama: Path, tmp_path: Path) -> None:
    """One pair: the first loss is -log sigmoid(d - margin) + center (r_chosen + r_rejected)^2 by hand."""
    pair = {"prompt": "Anna visits the palace.\n", "chosen": "She sees an old mirror.", "rejected": "No."}
    losses = []
    for number, (margin, center) in enumerate([(None, None), (1.5, None), (1.5, 0.25)]):
        data = tmp_path / f"{number}.jsonl"
        data.write_text(json.dumps({**pair, **({} if margin is None else {"margin": margin})}) + "\n")
        changes: dict[str, Any] = {
            "data__holdout": 0.0,
            "stages__reward__data": [{"path": str(data)}],
            "stages__reward__batch": 1,
            "stages__reward__micro_batch": 1,
            "stages__reward__steps": 1,
            "stages__reward__center": center,
        }
        case = Case(ranks, tiny.recipe(tmp_path / f"{number}.yaml", tiny_llama, **changes), tmp_path / str(number))
        case.run("reward")
        row = case.rows("reward")[0]
        difference, total = row["margin"], 2 * row["mean_reward"]
        assert abs(difference) > 1e-3, "the two replies score the same"
        expected = math.log1p(math.exp(-(difference - (margin or 0.0)))) + (center or 0.0) * total**2
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
        losses.append(row["loss"])
    assert losses[0] < losses[1] < losses[2]


@pytest.fixture(scope="module")
def padless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer has an EOS and nothing that could serve as a pad, as GPT-2's."""
    folder = tiny.model(tmp_path_factory.mktemp("padless") / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        for key in ("pad_token", "unk_token", "padding"):
            content.pop(key, None)
        text = json.dumps(content)
        for name in PAD_NAMES:
            text = text.replace(json.dumps(name), json.dumps("w" + name.strip("<>[]|")))
        (folder / file).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "pad_token_id": None}))
    return folder


@pytest.mark.parametrize(("method", "zero"), [("lora", "zero2"), ("full", "zero2"), ("full", "zero3")])
def test_added_pad(ranks: Get, padless: Path, tmp_path: Path, method: str, zero: str) -> None:
    """The pad gets a row of its own during training; an adapter still opens on the base as it is."""
    vocabulary = json.loads((padless / "config.json").read_text())["vocab_size"]
    own = AutoTokenizer.from_pretrained(padless)
    assert own.pad_token_id is None
    assert len(own) == vocabulary
    recipe = tiny.recipe(tmp_path / "tiny.yaml", padless, **SHORT, deepspeed__config=zero)
    case, overrides = Case(ranks, recipe, tmp_path / "run"), FULL if method == "full" else []
    case.call("tests.support.stages:chain", overrides=overrides, world=2)
    published = AutoTokenizer.from_pretrained(case.dir / "ppo" / "output")
    assert (published.pad_token, published.pad_token_id) == (ADDED_PAD, vocabulary)
    differences = case.opens(*overrides)
    assert max(differences[stage] for stage in ("sft", "reward", "ppo")) <= 2e-5
    # Beside an adapter the pad's row is not published; beside a full model it takes a mean row's share, at most 1 / (V + 1),
    # a little off because the other rows went on to train.
    assert differences["pad_share"] <= (1.1 / (vocabulary + 1) if method == "full" else 0.0)
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(case.dir / "ppo" / "output")
        assert model.get_input_embeddings().num_embeddings == vocabulary + 1
    else:
        names = load_file(case.dir / "ppo" / "output" / ADAPTER)
        assert not [name for name in names if "embed" in name or "lm_head" in name]


@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_offload(lora: Case, tmp_path: Path, config: str) -> None:
    """Optimizer states (and under ZeRO-3 parameters) in CPU memory give the update that they give without."""
    plain = lora.update(tmp_path, "plain.pt", f"deepspeed.config={config.removesuffix('_offload')}")
    offloaded = lora.update(tmp_path, "offloaded.pt", f"deepspeed.config={config}")
    for role in (".policy.weight", ".critic.weight"):
        assert close(offloaded["change"], plain["change"], role) < 1e-5, role


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeeds_rollout_engine(lora: Case, tmp_path: Path, zero: str) -> None:
    """PPO through it sees its own policy, as the canary checks by log-probabilities and by Hugging Face's greedy tokens."""
    case = lora.copy(tmp_path)
    overrides = ["stages.ppo.sampling.engine=deepspeed", f"deepspeed.config={zero}"]
    differences = case.call("tests.distributed.variant_cases:ppo_and_canary", overrides=overrides, world=2)
    assert differences, "the canary did not look"
    assert max(differences) <= 1e-4


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_plain_deepspeed_takes_the_configuration(ranks: Get, path: Path) -> None:
    found = ranks(1).call("tests.distributed.variant_cases:plain_deepspeed", path=str(path))[0]
    assert found["stage"] == int(path.stem[4])
    assert found["moved"] > 0.0
