"""Fine-tuning methods in a recipe: switching by one word, defaults, and what is refused, with a method that works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.methods import METHODS
from pipeline.config.recipe import load
from pipeline.config.schema import Adapter
from pipeline.errors import UserError

pytestmark = pytest.mark.fast


def recipe(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A recipe over a base of which only config.json is there; `changes` with dotted keys (`__`)."""
    (folder / "base").mkdir(exist_ok=True)
    config = {"model_type": family, "attn_logit_softcapping": 50.0 if family == "gemma2" else None}
    (folder / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    value: dict[str, Any] = {
        "name": "methods",
        "base": {"model": "base"},
        "adapter": {"method": "lora", "r": 8},
        "deepspeed": {"config": "zero2"},
        "stages": {
            "sft": {"kind": "sft", "data": [{"path": "rows.jsonl"}], "lr": 1e-4},
            "reward": {"kind": "reward", "data": [{"path": "rows.jsonl"}], "lr": 1e-4},
            "ppo": {
                "kind": "ppo",
                "policy": "sft",
                "reward": "reward",
                "prompts": [{"path": "rows.jsonl"}],
                "steps": 10,
                "lr": 1e-5,
            },
        },
    }
    for key, change in changes.items():
        node, (*parts, last) = value, key.split("__")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = change
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].shared])
def test_one_word_switches_all_stages(tmp_path: Path, method: str) -> None:
    stages = load(recipe(tmp_path), [f"adapter.method={method}"]).stages
    for block in stages.values():
        kept = {"r": 8} if METHODS[method].peft == "LORA" else {}
        expected = {"method": method, **METHODS[method].options, **kept}
        assert block.adapter.model_dump() == expected
        assert block.base.quantization == ("nf4" if method == "qlora" else None)


def test_a_stage_of_another_method_takes_none_of_the_recipe_s_keys(tmp_path: Path) -> None:
    stages = load(recipe(tmp_path, stages__reward__adapter={"method": "ia3"})).stages
    assert stages["reward"].adapter.model_dump() == {"method": "ia3", "modules": {}}
    assert stages["sft"].adapter.r == 8


def test_continuing_needs_the_same_shape() -> None:
    lora = Adapter(method="lora", r=4)
    assert lora.continues(Adapter(method="lora", r=4, dropout=0.1, lr_ratio=16.0))
    assert lora.continues(Adapter(method="qlora", r=4))
    assert not lora.continues(Adapter(method="lora", r=8))
    assert not lora.continues(Adapter(method="rslora", r=4))
    assert not Adapter(method="adalora").continues(Adapter(method="adalora"))
    assert not Adapter(method="full").continues(Adapter(method="full"))


REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "method that is none": ({"adapter": {"method": "lorra"}}, "adapter.method", ["found 'lorra'", "write `lora`"]),
    "key of another method": (
        {"adapter": {"method": "mam", "r": 8}},
        "adapter.r",
        ["mam has no such key", "one of: num_virtual_tokens, encoder_hidden_size, bottleneck_dim"],
    ),
    "key of a method without keys": ({"adapter": {"method": "bitfit", "r": 8}}, "adapter.r", ["remove it"]),
    "place that is none": (
        {"adapter": {"method": "ia3", "modules": {"querry": ["q"]}}},
        "adapter.modules",
        ["no place is called querry", "write `query`"],
    ),
    "4-bit base": (
        {"base": {"model": "base", "quantization": "nf4"}, "stages__sft__adapter": {"method": "pissa"}},
        "stages.sft.adapter.method",
        ["pissa on a 4-bit base", "components out of the base", "write `method: lora`"],
    ),
    "ZeRO-3": (
        {"adapter": {"method": "ln_tuning"}, "deepspeed__config": "zero3"},
        "stages.sft.adapter.method",
        ["ln_tuning under ZeRO-3", "a shard has nothing to copy", "write `method: bitfit`, or use zero2"],
    ),
    "4-bit base under ZeRO-3": (
        {
            "adapter": {"method": "dora"},
            "base": {"model": "base", "quantization": "nf4"},
            "deepspeed__config": "zero3",
        },
        "stages.sft.adapter.method",
        ["dora on a 4-bit base under ZeRO-3", "write `method: lora`, or use zero2"],
    ),
    "transposed layers": (
        {"family": "gpt2", "adapter": {"method": "oft"}},
        "stages.sft.adapter.method",
        ["oft on gpt2", "write `method: lora`"],
    ),
    "soft cap": (
        {"family": "gemma2", "adapter": {"method": "prefix_tuning"}},
        "stages.sft.adapter.method",
        ["soft cap", "write `method: adapter_parallel`"],
    ),
    "attention that a prefix is not in": (
        {"adapter": {"method": "mam"}, "base": {"model": "base", "attn_implementation": "eager"}},
        "stages.sft.base.attn_implementation",
        ["mam with eager", "write `attn_implementation: sdpa`"],
    ),
    "family that nobody knows": (
        {"family": "mamba", "adapter": {"method": "adapter_houlsby"}},
        "stages.sft.adapter.modules",
        ["'mamba'", "names for attention_output, feed_forward_output", "modules: {attention_output: [NAME]}"],
    ),
    "roles on one base": (
        {"stages__ppo__adapter": {"method": "pissa"}},
        "stages.ppo.adapter.method",
        ["pissa in PPO", "write `method: lora`"],
    ),
    "a merged copy of what adds no matrix": (
        {"adapter": {"method": "dora"}, "stages__ppo__sampling": {"adapter": "merged"}},
        "stages.ppo.sampling.adapter",
        ["dora adds no matrix", "write `adapter: auto`"],
    ),
    "parent that does not merge": (
        {"stages__sft__adapter": {"method": "mam"}},
        "stages.ppo.policy",
        [
            "lora on top of sft, whose mam adapter cannot become part of the base",
            "`adapter: {method: lora}` in stage sft",
        ],
    ),
    "reward model that does not merge": (
        {"stages__reward__adapter": {"method": "loreft"}},
        "stages.ppo.reward",
        ["lora on top of reward, whose loreft adapter", "in stage reward"],
    ),
    "critic with weights of its own on a policy that does not merge": (
        {"adapter": {"method": "mam"}, "stages__ppo__critic": {"init": "policy", "kind": "model"}},
        "stages.ppo.policy",
        ["a critic with weights of its own on top of sft, whose mam adapter", "in stage sft"],
    ),
    "biases that the family has no place for": (
        {"family": "qwen2", "stages__sft__adapter": {"method": "bitfit"}},
        "stages.ppo.policy",
        ["lora on top of sft, whose bitfit adapter", "qwen2 has no place for all of its biases"],
    ),
    "prefix of a reward model under another attention": (
        {
            "stages__reward__adapter": {"method": "prefix_tuning"},
            "stages__ppo__critic": {"init": "policy"},
            "stages__ppo__base": {"attn_implementation": "eager"},
        },
        "stages.ppo.base.attn_implementation",
        ["prefix_tuning with eager", "write `attn_implementation: sdpa`"],
    ),
    "a merged copy of AdaLoRA on 4 bits": (
        {
            "adapter": {"method": "adalora"},
            "base": {"model": "base", "quantization": "nf4"},
            "stages__ppo__sampling": {"adapter": "merged"},
        },
        "stages.ppo.sampling.adapter",
        ["adalora adds no matrix to the weights of a 4-bit base"],
    ),
    "ranks that do not fall": (
        {"adapter": {"method": "adalora", "target_r": 20}},
        "adapter",
        ["lowers ranks from init_r to target_r, found 12 and 20"],
    ),
    "no room to allocate in": (
        {"adapter": {"method": "adalora", "tinit": 0.5, "tfinal": 0.6}},
        "adapter",
        ["must add up to less than 1"],
    ),
    "no step to allocate in": (
        {"adapter": {"method": "adalora", "tinit": 40, "tfinal": 60}, "stages__sft__steps": 100},
        "stages.sft.adapter.tinit",
        ["ranks would be pruned between step 40 and step 40, of 100", "lower tinit or tfinal"],
    ),
    "too few updates to allocate in": (  # 4 steps x 2 epochs x 2 minibatches, after the last of which ranks are final
        {
            "adapter": {"method": "adalora", "tinit": 15, "tfinal": 0},
            "stages__ppo__steps": 4,
            "stages__ppo__epochs": 2,
            "stages__ppo__minibatches": 2,
        },
        "stages.ppo.adapter.tinit",
        ["ranks would be pruned between step 15 and step 15, of 16"],
    ),
    "an actor that waits too long to allocate in": (  # a share is of all 10 updates, of which 7 are the critic's alone
        {"adapter": {"method": "adalora", "tinit": 0.2, "tfinal": 0.1}, "stages__ppo__freezing_actor_steps": 7},
        "stages.ppo.adapter.tinit",
        ["ranks would be pruned between step 2 and step 2, of 3"],
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusal_names_the_key_the_reason_and_what_works(
    case: tuple[dict[str, Any], str, list[str]], tmp_path: Path
) -> None:
    changes, place, words = case
    with pytest.raises(UserError) as raised:
        load(recipe(tmp_path, **changes))
    message = str(raised.value)
    assert f"recipe r.yaml: {place}:" in message
    for word in words:
        assert word in message


def test_without_a_critic_nothing_builds_on_the_reward_model(tmp_path: Path) -> None:
    """Rewards that are no stage, and reward models whose adapters do not merge, go with an estimator without a critic."""
    grpo = {"stages__ppo__advantage_estimator": "grpo", "stages__ppo__samples_per_prompt": 4}
    load(recipe(tmp_path, stages__ppo__reward=[{"function": "package.module:score"}], **grpo))
    load(recipe(tmp_path, stages__reward__adapter={"method": "mam"}, **grpo))


def test_ranks_have_one_step_to_fall_in(tmp_path: Path) -> None:
    """Step 40 alone of 100; or nobody knows yet how many steps there are."""
    adapter = {"method": "adalora", "tinit": 40, "tfinal": 59}
    load(recipe(tmp_path, adapter=adapter, stages__sft__steps=100, stages__ppo__steps=100))
    load(recipe(tmp_path, adapter=adapter, stages__ppo__steps=100))


def test_bitfit_merges_where_the_family_holds_biases(tmp_path: Path) -> None:
    load(recipe(tmp_path, family="llama", stages__sft__adapter={"method": "bitfit"}))


def test_switching_within_a_kind_keeps_what_both_have(tmp_path: Path) -> None:
    path = recipe(tmp_path, adapter={"method": "mam", "bottleneck_dim": 16, "num_virtual_tokens": 7})
    switched = load(path, ["adapter.method=prefix_tuning"]).stages["sft"].adapter
    assert switched.model_dump() == {
        "method": "prefix_tuning",
        "num_virtual_tokens": 7,
        "encoder_hidden_size": 128,
        "modules": {},
    }


def test_names_that_a_recipe_gives_make_a_family_known(tmp_path: Path) -> None:
    modules = {"attention_output": ["out"], "feed_forward_output": ["w2"]}
    load(recipe(tmp_path, family="mamba", adapter={"method": "adapter_houlsby", "modules": modules}))


def test_the_records_are_free_of_torch() -> None:
    code = "import sys, pipeline.config.methods, pipeline.config.fitting; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
