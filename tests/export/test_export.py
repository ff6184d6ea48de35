"""`relay export` on a published run: what plain libraries make of the folders, against the adapter on its base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from pipeline import handoff
from pipeline.adapters import build
from pipeline.config.schema import Adapter, Base
from pipeline.errors import UserError
from pipeline.export.command import export
from pipeline.model import begin
from tests.support import published, tiny

BASE = tiny.QUICKSTART / "base"
TEXT = "In winter, Hugo visits the palace. What does he see?\nThe palace has a mirror."
Export = Callable[..., Path]

PLAIN = """
import json, sys
sys.modules["pipeline"] = None  # no Relay here
import torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folders, base, text = json.loads(sys.argv[1])
found = {}
for name, folder in folders.items():
    tok = AutoTokenizer.from_pretrained(folder)
    asked = tok(text, return_tensors="pt")
    kind = AutoModelForSequenceClassification if name.startswith("reward") else AutoModelForCausalLM
    if name == "adapter":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder)
    else:
        model = kind.from_pretrained(folder, dtype="auto")
    model.eval()
    with torch.no_grad():
        found[name] = {"logits": model(**asked).logits.float().tolist(), "dtype": str(model.dtype)}
        if kind is AutoModelForCausalLM:
            chat = tok.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False)
            made = model.generate(**asked, max_new_tokens=12, do_sample=False)
            found[name] |= {"chat": chat, "ids": made[0].tolist()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plain(exported: Export, sharded: Path) -> dict[str, Any]:
    """What a process without Relay finds in the exports."""
    folders = {
        "adapter": exported("ppo"),
        "fp32": sharded,
        "bf16": exported("ppo", merge=True, dtype="bf16"),
        "fp16": exported("ppo", merge=True, dtype="fp16"),
        "whole": exported("whole"),
        "retyped": exported("whole", dtype="fp16"),
        "reward": exported("reward", merge=True),
    }
    asked = json.dumps([{name: str(folder) for name, folder in folders.items()}, str(BASE), TEXT])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, asked], capture_output=True, text=True, cwd=folders["fp32"].parent, env=env
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tokens() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(BASE)(TEXT, return_tensors="pt")["input_ids"]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits.float()


def on_base(run: Path, stage: str) -> torch.Tensor:
    """Logits of the published adapter on its base, in float32, by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, run / stage / "output"))


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("adapter", "float32", 1e-6), ("fp32", "float32", 5e-5), ("bf16", "bfloat16", 0.2), ("fp16", "float16", 0.02)],
)
def test_the_export_is_the_adapter_on_its_base(
    plain: dict[str, Any], run: Path, name: str, dtype: str, tolerance: float
) -> None:
    """Logits of up to 16, which the adapter moves by more than 0.5. What is left is rounding."""
    expected = on_base(run, "ppo")
    found = plain[name]
    assert found["dtype"] == f"torch.{dtype}"
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=tolerance, rtol=0)
    moved = (expected - logits(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32))).abs().max()
    assert moved > 0.5


def test_it_generates_what_the_adapter_on_its_base_does(plain: dict[str, Any], run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "ppo" / "output").eval()
    made = model.generate(input_ids=tokens(), max_new_tokens=12, do_sample=False)
    assert plain["fp32"]["ids"] == plain["adapter"]["ids"] == made[0].tolist()
    assert plain["fp32"]["chat"] == "\n\nHuman: hello\n\nAssistant:"


def test_a_full_stage_is_copied_or_typed_anew(plain: dict[str, Any], exported: Export, run: Path) -> None:
    published_file = run / "whole" / "output" / "model.safetensors"
    assert (exported("whole") / "model.safetensors").read_bytes() == published_file.read_bytes()
    before, after = load_file(published_file), load_file(exported("whole", dtype="fp16") / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(torch.float16)), name
    assert plain["retyped"]["dtype"] == "torch.float16"


def test_a_reward_model_is_a_sequence_classifier(plain: dict[str, Any], exported: Export, run: Path) -> None:
    """Its score is that of the published adapter and head on the base."""
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, run / "reward" / "output"))
    torch.testing.assert_close(torch.tensor(plain["reward"]["logits"]), expected, atol=1e-5, rtol=0)
    assert AutoConfig.from_pretrained(exported("reward", merge=True)).architectures == [
        "LlamaForSequenceClassification"
    ]


def test_4_bits_are_dequantised_first(exported: Export, run: Path) -> None:
    """The merged model is the adapter on what the base's 4-bit weights stand for; computed in 4 bits it is that but for
    bf16's rounding."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    packed = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=four_bit, dtype=torch.bfloat16)
    output = run / "packed" / "output"
    live = logits(PeftModel.from_pretrained(packed, output))
    packed = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=four_bit, dtype=torch.bfloat16)
    expected = logits(PeftModel.from_pretrained(packed.dequantize().float(), output))
    folder = exported("packed", merge=True, dtype="fp32")
    found = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(found, live, atol=0.2, rtol=0)
    assert (expected - on_base(run, "packed")).abs().max() > 0.3, "4 bits are not the weights"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def names(file: Path) -> set[str]:
    with safe_open(file, "pt") as weights:
        return set(weights.keys())


def test_vllm_s_loader_finds_the_weights(sharded: Path) -> None:
    """It globs *.safetensors, keeps those that the index names, takes `consolidated*` for Mistral's own format, and loads each
    tensor of each file by the name that the architecture's checkpoints have."""
    files = sorted(sharded.glob("*.safetensors"))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 2
    assert {file.name for file in files} == set(index.values())
    held = [name for file in files for name in names(file)]
    assert sorted(held) == sorted(index), "each weight in one file, that of the index"
    assert all(name in names(sharded / file) for name, file in index.items())
    assert set(held) == names(BASE / "model.safetensors")
    assert not list(sharded.glob("consolidated*"))
    assert not {file.suffix for file in sharded.iterdir()} & {".bin", ".pt", ".pth"}
    assert max(file.stat().st_size for file in files) < 310_000


def test_vllm_s_loader_finds_what_to_build(sharded: Path, exported: Export) -> None:
    """An architecture by name, a dtype, no quantisation, and no more tokens than rows."""
    for folder, dtype in ((sharded, torch.float32), (exported("ppo", merge=True, dtype="bf16"), torch.bfloat16)):
        config = AutoConfig.from_pretrained(folder)
        assert config.architectures == ["LlamaForCausalLM"]
        assert hasattr(transformers, config.architectures[0])
        assert config.dtype == dtype
        assert not hasattr(config, "quantization_config")
        assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
        for file in folder.glob("*.safetensors"):
            assert {value.dtype for value in load_file(file).values()} == {dtype}


def test_vllm_s_loader_finds_how_to_generate(sharded: Path) -> None:
    tok = AutoTokenizer.from_pretrained(sharded)
    made = GenerationConfig.from_pretrained(sharded)
    stops = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
    assert tok.eos_token_id in stops
    assert made.pad_token_id == tok.pad_token_id != tok.eos_token_id
    assert tok.chat_template == (sharded / "chat_template.jinja").read_text()


def test_the_recipe_s_chat_template_goes_into_the_tokenizer(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    recipe = published.recipe(tmp_path, base__chat_template="own.jinja")
    published.publish(recipe, tmp_path / "run", "sft")
    export(str(tmp_path / "run"), to=tmp_path / "out", merge=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_a_model_without_a_chat_template_is_exported(run: Path, tmp_path: Path) -> None:
    """As one that was published by hand: Relay itself gives every tokenizer a template."""
    baton = handoff.open_baton(run / "sft")

    def write(folder: Path) -> None:
        for name in baton.manifest["files"]:
            if name != "chat_template.jinja":
                (folder / name).write_bytes((baton.path / name).read_bytes())

    handoff.publish(tmp_path / "run" / "sft", write, baton.manifest)
    export(str(tmp_path / "run"), "sft", to=tmp_path / "out", merge=True)
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tok.chat_template is None
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")).shape[-1] == 511


def test_run_is_a_folder_a_name_or_a_recipe(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "story").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    export("story", "sft")
    export(str(run.parent / "r.yaml"), "sft", to=tmp_path / "two")
    export(str(run.parent / "r.yaml"), "sft", to=tmp_path / "three", run_dir=run)
    assert "exports/run-sft: adapter of sft" in capsys.readouterr().out
    weights = [folder / "adapter_model.safetensors" for folder in (Path("exports/run-sft"), Path("two"), Path("three"))]
    assert len({file.read_bytes() for file in weights}) == 1


def test_a_lora_that_is_one_already(exported: Export) -> None:
    folder = exported("ppo", lora=True)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "A LoRA that equals" in (folder / "README.md").read_text()
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"run": "nowhere"}, "run nowhere: no such file and no shipped recipe|recipe nowhere: no such file"),
        ({"stage": "pppo"}, "stage pppo: not published in .*\n  expected one of: evaluate, packed, ppo, reward"),
        ({"stage": "evaluate"}, "of kind evaluate, which publishes no model"),
        ({"stage": None}, "3 policies that no other was made from: packed, ppo, whole"),
        ({"dtype": "bf16"}, "--dtype bf16: an adapter is exported as it was trained"),
        ({"lora": True, "merge": True}, "--lora: a full model is asked for too"),
        ({"stage": "whole", "lora": True}, "--lora: its stage published a full model"),
        ({"to": "HERE"}, "it is there already"),
        ({"private": True}, "--private: nothing is pushed"),
        ({"gguf_type": "q8_0"}, "--gguf-type q8_0: no GGUF file is asked for"),
        ({"merge": True, "shard": "big"}, "--max-shard-size big: no size"),
    ],
)
def test_refused(run: Path, tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    (tmp_path / "HERE").mkdir()
    options = {"run": str(run), "stage": "ppo", **asked, "to": tmp_path / asked.get("to", "out")}
    with pytest.raises(UserError, match=words):
        export(**options)
    assert [p.name for p in tmp_path.iterdir()] == ["HERE"]


def test_an_adapter_that_does_not_merge_is_refused(tmp_path: Path) -> None:
    sft = {"kind": "sft", "data": [{"path": str(tiny.QUICKSTART / "demonstrations.jsonl")}], "lr": 1e-2, "steps": 2}
    sft["adapter"] = {"method": "prompt_tuning", "num_virtual_tokens": 3}
    recipe = tiny.recipe(tmp_path / "r.yaml", BASE, deepspeed__num_gpus=1, stages={"sft": sft})
    published.publish(recipe, tmp_path / "run", "sft")
    with pytest.raises(UserError, match="its prompt_tuning adapter cannot become part of the base"):
        export(str(tmp_path / "run"), "sft", merge=True, to=tmp_path / "out")
    export(str(tmp_path / "run"), "sft", to=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import pipeline.adapters  # of relay-rlhf" in card
    assert "registers the method with PEFT" in card


@pytest.mark.parametrize("damaged", ["ppo/output/adapter_model.safetensors", "base/model.safetensors"])
def test_what_is_damaged_is_not_exported(run: Path, tmp_path: Path, damaged: str) -> None:
    """Of the stage, and of the base below it."""
    base = tmp_path / "base"
    base.mkdir()
    for file in BASE.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    recipe = published.recipe(tmp_path, base__model=str(base))
    published.run(recipe, tmp_path, ("sft", "reward", "ppo"))
    file = tmp_path / damaged
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = "altered" if "output" in damaged else "trained on another base"
    with pytest.raises(UserError, match=words):
        export(str(tmp_path), "ppo", to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_an_export_that_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.export.card.write", full)
    with pytest.raises(OSError, match="No space left"):
        export(str(run), "ppo", to=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_classes(tmp_path: Path) -> None:
    """Merged, with the task's names; the adapter's card says how many classes the base needs."""
    names = {"num_labels": 2, "id2label": {0: "entailment", 1: "not_entailment"}}
    model = AutoModelForSequenceClassification.from_pretrained(BASE, dtype=torch.float32, **names)
    torch.manual_seed(3)
    model = build.attach(model, Adapter(method="lora", r=4, alpha=8.0), "SEQ_CLS", steps=1)
    with torch.no_grad():
        for parameter in build.trained(model, "default"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    tok = AutoTokenizer.from_pretrained(BASE)
    record = {"model": str(BASE), "revision": None, "content_hash": handoff.model_hash(str(BASE)), "quantization": None}
    adapter, held = Adapter(method="lora", r=4, alpha=8.0), Base(model=str(BASE), dtype="fp32")
    block = {"task": "rte", "adapter": adapter.model_dump(mode="json"), "base": held.model_dump(mode="json")}
    facts = {"stage": "glue", "kind": "classify", "recipe": "glue-rte", "inputs": {"block": block}, "base": record}
    facts |= {"adapter": "lora", "parents": {}, "data": [], "metrics": {}, "versions": {}}
    facts |= {"seed": 0, "world_size": 1, "zero_stage": 0}
    handoff.publish(tmp_path / "run" / "glue", begin.writer(model, tok, record), facts)
    export(str(tmp_path / "run"), "glue", merge=True, to=tmp_path / "full")
    export(str(tmp_path / "run"), "glue", to=tmp_path / "adapter")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full", dtype="auto")
    assert found.config.id2label == names["id2label"]
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)
    assert 'from_pretrained("the base", num_labels=2)' in (tmp_path / "adapter" / "README.md").read_text()
