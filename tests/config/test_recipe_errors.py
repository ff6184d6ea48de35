"""What a user can get wrong in a recipe, and the message that says where, what was expected and how to mend it."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.recipe import load
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

GONE = object()
"""Stands for a key to be taken out."""

RECIPE: dict[str, Any] = {
    "name": "errors",
    "base": {"model": "some/model"},
    "deepspeed": {"num_gpus": 2},
    "stages": {
        "sft": {"kind": "sft", "data": [{"path": "rows.jsonl", "share": 0.2}], "lr": 1.0e-4, "batch": 32},
        "reward": {"kind": "reward", "data": [{"path": "rows.jsonl", "share": 0.4}], "lr": 1.0e-4},
        "ppo": {
            "kind": "ppo",
            "policy": "sft",
            "reward": "reward",
            "prompts": [{"path": "rows.jsonl", "share": 0.4}],
            "steps": 10,
            "lr": 1.0e-5,
            "kl": {"coef": 0.1},
        },
        "evaluate": {"kind": "evaluate", "model": "ppo", "against": "sft", "prompts": [{"path": "rows.jsonl"}]},
    },
}

# (what is changed, where the message must point, what it must say)
Case = tuple[dict[str, Any], str, list[str]]
CASES: dict[str, Case] = {
    "unknown key at the top": (
        {"adaptor": {"r": 8}},
        "recipe r.yaml: adaptor",
        ["unknown key", "one of: name, base, adapter", "write `adapter`"],
    ),
    "unknown key of a stage": ({"stages.sft.epoch": 2}, "stages.sft.epoch", ["unknown key", "write `epochs`"]),
    "unknown key of a block in a stage": (
        {"stages.ppo.kl.targt": 6},
        "stages.ppo.kl.targt",
        ["one of: coef, place, estimator, target, horizon", "write `target`"],
    ),
    "unknown key of a source": (
        {"stages.sft.data": [{"path": "rows.jsonl", "shard": 0.2}]},
        "stages.sft.data.0.shard",
        ["write `share`"],
    ),
    "unknown key of an inherited block": ({"base.dtyp": "bf16"}, "recipe r.yaml: base.dtyp", ["write `dtype`"]),
    "unknown key like no other": ({"stages.sft.xyzzy": 1}, "stages.sft.xyzzy", ["unknown key", "remove it"]),
    "word for a number": ({"stages.sft.batch": "many"}, "stages.sft.batch", ["found 'many'", "valid integer"]),
    "number below its range": ({"stages.reward.lr": -1}, "stages.reward.lr", ["found -1", "greater than 0"]),
    "number above its range": ({"stages.ppo.gamma": 1.5}, "stages.ppo.gamma", ["found 1.5", "less than or equal to 1"]),
    "word outside its list": (
        {"stages.ppo.kl.estimator": "k2"},
        "stages.ppo.kl.estimator",
        ["found 'k2'", "'k1' or 'k3'"],
    ),
    "word for a block": ({"stages.sft.deepspeed": "zero3"}, "stages.sft.deepspeed", ["found 'zero3'", "a block"]),
    "text for the base": ({"base": "some/model"}, "recipe r.yaml: base", ["found 'some/model'", "Base"]),
    "no required key": ({"stages.ppo.steps": GONE}, "stages.ppo.steps", ["missing", "add `steps:`"]),
    "misspelt required key": (
        {"stages.ppo.policy": GONE, "stages.ppo.polcy": "sft"},
        "stages.ppo.polcy",
        ["unknown key", "write `policy`"],
    ),
    "hold-out of one stage": ({"stages.sft.holdout": 0.0}, "stages.sft.holdout", ["`data.holdout`", "remove it here"]),
    "number that is none": ({"stages.sft.lr": float("inf")}, "stages.sft.lr", ["found inf", "finite number"]),
    "kind that is a list": ({"stages.sft.kind": ["sft"]}, "stages.sft.kind", ["found ['sft']", "one of: sft, reward"]),
    "misspelt DeepSpeed configuration": (
        {"stages.ppo.deepspeed": {"config": "zer2"}},
        "stages.ppo.deepspeed.config",
        ['no configuration "zer2"', "zero3_offload", "write `zero2`"],
    ),
    "no data": ({"stages.sft.data": []}, "stages.sft.data", ["at least 1 item"]),
    "no kind": ({"stages.sft.kind": GONE}, "stages.sft.kind", ["one of: sft, reward, ppo, evaluate"]),
    "misspelt kind": ({"stages.reward.kind": "rewrd"}, "stages.reward.kind", ["found 'rewrd'", "write `reward`"]),
    "name that is no file name": ({"name": "a/b"}, "recipe r.yaml: name", ["found 'a/b'", "match pattern"]),
    "stage named base": (
        {"stages.base": {"kind": "sft"}},
        "stages.base",
        ["'base' cannot be the name of a stage", "choose another name"],
    ),
    "stage that is no block": ({"stages.sft": "sft"}, "stages.sft", ["found str", "a block with `kind:`"]),
    "missing upstream": (
        {"stages.ppo.policy": "stf"},
        "stages.ppo.policy",
        ['no stage named "stf"', "one of: sft", "write `policy: sft`", 'add a stage called "stf"'],
    ),
    "missing upstream in a list": (
        {"stages.evaluate.reward": ["reward", "judge"]},
        "stages.evaluate.reward",
        ['no stage named "judge"'],
    ),
    "missing upstream and none of its kind": (
        {"stages.reward": GONE},
        "stages.ppo.reward",
        ['no stage named "reward"', "an upstream stage of kind reward"],
    ),
    "upstream of another kind": (
        {"stages.ppo.reward": "sft"},
        "stages.ppo.reward",
        ['stage "sft" is of kind sft', "one of: reward"],
    ),
    "base where a stage is needed": (
        {"stages.ppo.reward": "base"},
        "stages.ppo.reward",
        ['no stage named "base"', "one of: reward"],
    ),
    "cycle": (
        {"stages.sft.init": "ppo"},
        "stages.sft",
        ["wait for each other: sft -> ppo -> sft", "start from `base`"],
    ),
    "stage that starts from itself": ({"stages.sft.init": "sft"}, "stages.sft", ["sft -> sft", "start from `base`"]),
    "batch that does not divide over ranks": (
        {"stages.sft.batch": 33},
        "stages.sft.batch",
        ["33 sequences do not divide over 2 ranks", "a multiple of 2"],
    ),
    "batch of a rank that does not divide": (
        {"stages.sft.micro_batch": 5},
        "stages.sft.micro_batch",
        ["16 sequences per rank", "micro-batches of 5", "write `micro_batch: 4`"],
    ),
    "rollout that does not divide into minibatches": (
        {"stages.ppo.minibatches": 3},
        "stages.ppo.rollout_batch",
        ["64 responses", "3 minibatches", "a multiple of 3"],
    ),
    "misspelt estimator": (
        {"stages.ppo.advantage_estimator": "gaee"},
        "stages.ppo.advantage_estimator",
        ["found 'gaee'", "gae, grpo, rloo, reinforce_pp, remax", "write `gae`"],
    ),
    "estimator that compares one response with itself": (
        {"stages.ppo.advantage_estimator": "rloo"},
        "stages.ppo.samples_per_prompt",
        ["found 1", "at least 2"],
    ),
    "samples that do not divide the rollout": (
        {"stages.ppo.samples_per_prompt": 3},
        "stages.ppo.rollout_batch",
        ["64 responses are not 3 for each prompt", "a multiple of 3"],
    ),
    "penalty that would hold nothing": (
        {"stages.ppo.kl": {"place": "loss", "estimator": "k1"}},
        "stages.ppo.kl.estimator",
        ["gradient of mean zero", "k3"],
    ),
    "critic from a reward model that is not there": (
        {"stages.ppo.reward": [{"function": "a.b:c"}]},
        "stages.ppo.critic.init",
        ["no reward stage", "write `init: policy`"],
    ),
    "copied head and normalised scores": (
        {"stages.ppo.normalize_scores": True},
        "stages.ppo.normalize_scores",
        ["starts as the reward model", "write `critic: {init: policy}`"],
    ),
    "head that starts as a reward model": (
        {"stages.ppo.critic": {"kind": "head", "init": "reward"}},
        "stages.ppo.critic.init",
        ["a head on the policy's states starts fresh", "fix: leave it out"],
    ),
    "reward source of no kind": (
        {"stages.ppo.reward": [{"stge": "reward"}]},
        "stages.ppo.reward.0",
        ["one of the keys stage, function, http, verify"],
    ),
    "reward source of two kinds": (
        {"stages.ppo.reward": [{"stage": "reward", "function": "a.b:c"}]},
        "stages.ppo.reward.0",
        ["one of the keys stage, function, http, verify"],
    ),
    "unknown key of a reward source": (
        {"stages.ppo.reward": [{"stage": "reward", "wieght": 2}]},
        "stages.ppo.reward.0.wieght",
        ["unknown key"],
    ),
    "function that is not written as one": (
        {"stages.ppo.reward": [{"function": "a.b.c"}]},
        "stages.ppo.reward.0.function",
        ["found 'a.b.c'", "package.module:function"],
    ),
    "member of an ensemble that is no reward stage": (
        {"stages.ppo.reward": [{"stage": ["reward", "sft"]}]},
        "stages.ppo.reward",
        ['stage "sft" is of kind sft', "one of: reward"],
    ),
    "gold that is no stage": ({"stages.ppo.gold": "judge"}, "stages.ppo.gold", ['no stage named "judge"']),
    "check without its pattern": (
        {"stages.ppo.reward": [{"verify": "format"}]},
        "stages.ppo.reward.0",
        ["`pattern` belongs to `verify: format`"],
    ),
    "signal without what it needs": (
        {"stages.ppo.signals": {"stop_on": ["over_optimisation"]}},
        "stages.ppo.signals.stop_on",
        ["gold and eval_every"],
    ),
    "signal without a threshold": (
        {"stages.ppo.signals": {"stop_on": ["kl_budget"]}},
        "stages.ppo.signals.stop_on",
        ["kl_budget has no threshold", "set signals.kl_budget"],
    ),
    "signal of a critic that is not there": (
        {"stages.ppo.advantage_estimator": "remax", "stages.ppo.signals": {"stop_on": ["explained_variance"]}},
        "stages.ppo.signals.stop_on",
        ["explained_variance is a critic's", "remax has none"],
    ),
    "actor that waits for no critic": (
        {"stages.ppo.advantage_estimator": "remax", "stages.ppo.freezing_actor_steps": 2},
        "stages.ppo.freezing_actor_steps",
        ["remax has no critic to wait for"],
    ),
    "actor that waits for ever": (
        {"stages.ppo.freezing_actor_steps": 10**6},
        "stages.ppo.freezing_actor_steps",
        ["would wait for all", "at most"],
    ),
    "coefficient that cannot adapt": (
        {"stages.ppo.kl": {"coef": 0, "target": 6.0}},
        "stages.ppo.kl.coef",
        ["starts at 0 stays there"],
    ),
    "horizon of less than a step": (
        {"stages.ppo.kl": {"target": 6.0, "horizon": 12}},
        "stages.ppo.kl.horizon",
        ["could take all of the coefficient away", "above rollout_batch / 5"],
    ),
    "average that is not kept": ({"stages.ppo.publish": "ema"}, "stages.ppo", ["publish: ema needs ema_decay"]),
    "supervised rows that do not divide": (
        {"stages.ppo.ptx": {"data": [{"path": "rows.jsonl"}], "batch": 7}},
        "stages.ppo.ptx.batch",
        ["7 rows do not divide", "a multiple of"],
    ),
    "minibatch that does not divide over ranks": (
        {"stages.ppo.minibatches": 64},
        "stages.ppo.rollout_batch",
        ["1 sequences", "2 ranks", "a multiple of 2"],
    ),
    "shares above one": (
        {"stages.ppo.prompts": [{"path": "rows.jsonl", "share": 0.5}]},
        "stages.ppo",
        ["shares of rows.jsonl add up to 1.1", "at most 1 over all stages", "lower a share"],
    ),
    "full fine-tuning of 4-bit weights": (
        {"base.quantization": "nf4", "stages.sft.adapter": {"method": "full"}},
        "stages.sft.adapter.method",
        ["full fine-tuning of a 4-bit base", "write `method: lora`", "`quantization: null`"],
    ),
    "4-bit weights in float32": (
        {"base.quantization": "nf4", "base.dtype": "fp32"},
        "recipe r.yaml: base",
        ["dtype fp32", "write `dtype: bf16`"],
    ),
    "4-bit weights in float32 in one stage": (
        {"base.quantization": "nf4", "stages.sft.base": {"dtype": "fp32"}},
        "stages.sft.base",
        ["write `dtype: bf16`"],
    ),
    "best without evaluations": ({"stages.sft.publish": "best"}, "stages.sft", ["publish: best", "set eval_every"]),
    "early stopping without evaluations": (
        {"stages.ppo.early_stopping": 3},
        "stages.ppo",
        ["early_stopping", "set eval_every"],
    ),
    "judge that names no function": (
        {"stages.evaluate.judge": "my_judge"},
        "stages.evaluate.judge",
        ["found 'my_judge'", "`package.module:function`"],
    ),
    "no stages": ({"stages": {}}, "recipe r.yaml: stages", ["no stages", "add at least one stage"]),
    "no stages key": ({"stages": GONE}, "recipe r.yaml: stages", ["no stages", "stage name to block"]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message_names_the_key_and_the_fix(case: Case, tmp_path: Path) -> None:
    changes, place, words = case
    with pytest.raises(UserError) as raised:
        load(written(tmp_path, changes))
    assert_says(str(raised.value), place, words)


def test_the_recipe_of_the_cases_is_sound(tmp_path: Path) -> None:
    assert load(written(tmp_path, {})).order() == ["sft", "reward", "ppo", "evaluate"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [unclosed\nbase: {model: m}\n", ["not valid YAML", "line 2", "mend that line"]),
        ("- a\n- b\n", ["found list", "a mapping with name, base, stages"]),
        ("", ["found NoneType", "a mapping with name, base, stages"]),
    ],
    ids=["bad YAML", "a list", "an empty file"],
)
def test_file_that_is_no_recipe(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load(path)
    assert_says(str(raised.value), "recipe r.yaml", words)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match=r"recipe r\.yaml: not valid YAML"):
        load(path)


@pytest.mark.parametrize("name", ["nowhere.yaml", "quickstarr"])
def test_missing_file_lists_the_shipped_recipes(name: str) -> None:
    with pytest.raises(UserError) as raised:
        load(name)
    assert_says(str(raised.value), f"recipe {name}", ["no such file", "quickstart"])


@pytest.mark.parametrize(
    ("override", "place", "words"),
    [
        ("name.deeper=1", "--set name.deeper", ["name is not a block", "the dotted path of a key"]),
        ("stages.sft.lr.peak=1", "--set stages.sft.lr.peak", ["lr is not a block"]),
        ("stages.sft.lr", "--set stages.sft.lr", ["no `=`", "KEY=VALUE"]),
        ("name=[x", "--set name", ["'[x' is not valid YAML"]),
        ("stages.sft.epoch=2", "stages.sft.epoch", ["unknown key", "write `epochs`"]),
        ("stages.ppo.kl.target=high", "stages.ppo.kl.target", ["found 'high'", "valid number"]),
    ],
)
def test_override_that_cannot_be(override: str, place: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load(written(tmp_path, {}), [override])
    assert_says(str(raised.value), place, words)


def test_folder_of_a_shipped_recipes_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("quickstart").name == "quickstart"


def test_override_changes_one_key_and_makes_the_blocks_it_needs(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, {}), ["stages.ppo.kl.target=6", "stages.sft.deepspeed.num_gpus=4"])
    ppo: Any = recipe.stages["ppo"]
    assert (ppo.kl.target, ppo.kl.coef) == (6.0, 0.1)
    assert [block.deepspeed.num_gpus for block in recipe.stages.values()] == [4, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "arguments", "place", "words"),
    [
        (
            {"stages.ppo.policy": "stf"},
            [],
            "recipe r.yaml: stages.ppo.policy",
            ['no stage named "stf"', "one of: sft", "fix: write `policy: sft`, or add a stage"],
        ),
        ({"stages.sft.epoch": 2}, [], "recipe r.yaml: stages.sft.epoch", ["unknown key", "write `epochs`"]),
        ({}, ["--set", "name.deeper=1"], "--set name.deeper", ["name is not a block"]),
    ],
    ids=["missing upstream", "unknown key", "override"],
)
def test_command_line_says_it_in_one_paragraph(
    changes: dict[str, Any], arguments: list[str], place: str, words: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "plan", str(written(tmp_path, changes)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert_says(done.stderr.strip(), place, words)


def written(folder: Path, changes: dict[str, Any]) -> Path:
    """The sound recipe with `changes` (dotted key -> value), as a file r.yaml."""
    recipe = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        node = recipe
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    path_of_file = folder / "r.yaml"
    path_of_file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path_of_file


def assert_says(message: str, place: str, words: list[str]) -> None:
    """The first line points at `place`; the message holds all `words`."""
    assert place in message.splitlines()[0], message
    for word in words:
        assert word in message, message
