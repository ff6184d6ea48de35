"""What every method that Relay adds to PEFT must do, on each architecture: one contract, all methods."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import PeftType

import pipeline.adapters
from pipeline.adapters.soft_prompt import virtual_ids
from pipeline.adapters.tuner import tuner_layers
from pipeline.config.schema import Sampling
from pipeline.generation import hf, static
from tests.support.tiny import build
from tests.support.tuners import IDENTITY, METHODS, SHAPES, adapted, config, disturb, logits, padded

pytestmark = pytest.mark.fast

ROWS = [[7, 12, 33, 41, 8, 77, 19], [5, 90, 6], [64, 11, 23, 52, 31]]
CASES = [(method, shape) for method in METHODS for shape in SHAPES]
BASE: dict[str, Any] = {}


def base(shape: str) -> Any:
    if shape not in BASE:
        BASE[shape] = build(shape)
    return BASE[shape]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor], atol: float = 0.0) -> bool:
    return all(torch.allclose(a, b, rtol=0.0, atol=atol) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_fresh_and_disabled(method: str, shape: str) -> None:
    """Fresh adapters change nothing where the method promises so; disabled ones never do, to the bit."""
    model = adapted(method, shape, trained=False)
    plain = logits(base(shape), ROWS)
    fresh = logits(model, ROWS, name="policy")
    assert same(fresh, plain) == (method in IDENTITY)
    disturb(model, "policy")
    assert not same(logits(model, ROWS, name="policy"), fresh, atol=1e-2)
    with model.disable_adapter():
        assert same(logits(model, ROWS), plain)
    for layer in tuner_layers(model):  # as Relay's roles do it
        layer._disable_adapters = True
    assert same(logits(model, ROWS), plain)


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_saved_and_loaded(method: str, shape: str, tmp_path: Path) -> None:
    """A fresh process's view: PEFT opens the folder, to use it or to train on, and gets equal logits."""
    model = adapted(method, shape)
    wanted = logits(model, ROWS, name="policy")
    model.save_pretrained(tmp_path)
    folder = tmp_path / "policy"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert all(value == sorted(value) for value in written.values() if isinstance(value, list))

    loaded = PeftModel.from_pretrained(build(shape), folder).eval()
    assert same(logits(loaded, ROWS, name="default"), wanted)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    if shape == "llama":
        lean = PeftModel.from_pretrained(build(shape), folder, low_cpu_mem_usage=True).eval()
        assert same(logits(lean, ROWS, name="default"), wanted, atol=1e-5)
    resumed = PeftModel.from_pretrained(build(shape), folder, adapter_name="critic", is_trainable=True).eval()
    assert same(logits(resumed, ROWS, name="critic"), wanted)
    trained = {name for name, parameter in resumed.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in resumed.named_parameters() if ".critic." in name}

    state = get_peft_model_state_dict(
        model, state_dict={n: p for n, p in model.named_parameters() if ".policy." in n}, adapter_name="policy"
    )
    fresh = get_peft_model(build(shape), config(method, shape), adapter_name="reward").eval()
    result = set_peft_model_state_dict(fresh, state, adapter_name="reward")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if ".reward." in key]
    assert same(logits(fresh, ROWS, name="reward"), wanted)


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_padding_side(method: str, shape: str) -> None:
    model = adapted(method, shape)
    alone = [logits(model, [row], name="policy")[0] for row in ROWS]
    assert same(logits(model, ROWS, "right", name="policy"), alone, atol=2e-4)
    assert same(logits(model, ROWS, "left", name="policy"), alone, atol=2e-4)


@pytest.mark.parametrize(("method", "shape"), [*CASES, ("mam", "gpt_neox"), ("p_tuning", "gpt_neox")])
def test_rollouts(method: str, shape: str) -> None:
    """Relay's engine and `generate` decode the same tokens, with the log-probabilities of one forward over them."""
    model = adapted(method, shape)
    inner, prompt = model.get_base_model(), virtual_ids(model, "policy")
    assert static.supported(inner) is None
    prompts, sampling = [prompt + row for row in ROWS], Sampling(temperature=1.0, max_response_length=6)
    fast = static.sample(inner, prompts, None, sampling, pad=0, eos=[1], slots=2)
    slow = hf.sample(inner, prompts, None, sampling, pad=0, eos=[1])
    for row in range(len(ROWS)):
        assert fast.response(row) == slow.response(row)
    texts = [row + fast.response(place) for place, row in enumerate(ROWS)]
    for place, found in enumerate(logits(model, texts, name="policy")):
        reply = torch.tensor(fast.response(place))
        wanted = torch.log_softmax(found[len(ROWS[place]) - 1 : -1], -1).gather(1, reply.unsqueeze(1)).squeeze(1)
        for rollout in (fast, slow):
            assert torch.allclose(rollout.logprobs[place, : len(reply)], wanted, rtol=0.0, atol=2e-4)


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_recomputed_activations(method: str, shape: str) -> None:
    def gradients(reentrant: bool | None) -> dict[str, torch.Tensor]:
        model = adapted(method, shape).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = padded(ROWS, "right")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(None)
    assert wanted
    assert all(".policy." in name for name in wanted)
    for reentrant in (False, True):
        found = gradients(reentrant)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], atol=1e-5, rtol=1e-4) for name in wanted)


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_two_adapters(method: str, shape: str) -> None:
    """Two adapters on one base act as each would alone, switched by PEFT or, as Relay's roles do, layer by layer."""
    model = adapted(method, shape)
    model.add_adapter("critic", config(method, shape))
    disturb(model, "critic", seed=1)
    alone = adapted(method, shape)
    other = adapted(method, shape, "critic", trained=False)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model, adapter_name="critic"), adapter_name="critic")
    wanted = {"policy": logits(alone, ROWS, name="policy"), "critic": logits(other, ROWS, name="critic")}
    for name in ("critic", "policy"):
        model.set_adapter(name)
        assert same(logits(model, ROWS, name=name), wanted[name])
        assert all((f".{name}." in key) == p.requires_grad for key, p in model.named_parameters())
    for name in ("critic", "policy"):
        for layer in tuner_layers(model):
            layer._active_adapter = [name]
        assert same(logits(model, ROWS, name=name), wanted[name])
    copied = copy.deepcopy(model)
    disturb(model, "policy", seed=2)
    assert same(logits(copied, ROWS, name="policy"), wanted["policy"])
    model.delete_adapter("policy")
    model.set_adapter("critic")
    assert same(logits(model, ROWS, name="critic"), wanted["critic"])


@pytest.mark.parametrize("method", METHODS)
def test_dtype(method: str) -> None:
    """Adapters are made in the base's dtype and promoted only if PEFT is left to."""
    model = get_peft_model(build("llama").bfloat16(), config(method, "llama"), autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    plain = logits(build("llama").bfloat16(), ROWS)
    assert same(logits(model, ROWS, name="default"), plain) == (method in IDENTITY)
    promoted = get_peft_model(build("llama").bfloat16(), config(method, "llama"))
    assert {p.dtype for n, p in promoted.named_parameters() if ".default." in n} == {torch.float32}
    assert logits(promoted, ROWS, name="default")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method: str) -> None:
    model = adapted(method, "llama")
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(ValueError, match="cannot follow adapter_names"):
        model(input_ids=ids, adapter_names=["policy"])
    if method == "bitfit":
        return
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert same(logits(model, ROWS, name="policy"), logits(adapted(method, "llama"), ROWS, name="policy"))
    plain = model.unload()
    assert same(logits(plain, ROWS), logits(base("llama"), ROWS))
    assert not tuner_layers(plain)


@pytest.mark.parametrize("method", METHODS)
def test_classifier(method: str) -> None:
    """With a score head of its own, saved with the adapter; the score is that of each row's last token."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.support.tiny import SHAPES as CONFIGS

    torch.manual_seed(0)
    values = {**CONFIGS["llama"], "vocab_size": 97, "pad_token_id": 0, "num_labels": 1}
    plain = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    fresh = copy.deepcopy(plain)
    model = get_peft_model(plain, config(method, "llama", task_type="SEQ_CLS", modules_to_save=["score"])).eval()
    disturb(model, "default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".default." in n
    }
    with torch.no_grad():
        alone = torch.cat([model(**padded([row], "right")).logits for row in ROWS])
        for side in ("right", "left"):
            assert torch.allclose(model(**padded(ROWS, side)).logits, alone, atol=2e-4)
        state = get_peft_model_state_dict(model)
        assert sum("score" in key for key in state) == 1
        loaded = get_peft_model(fresh, config(method, "llama", task_type="SEQ_CLS", modules_to_save=["score"])).eval()
        set_peft_model_state_dict(loaded, state)
        assert torch.equal(loaded(**padded(ROWS, "right")).logits, model(**padded(ROWS, "right")).logits)


@pytest.mark.parametrize("method", METHODS)
def test_four_bit(method: str) -> None:
    """On 4-bit layers adapters are in the dtype that the model computes in, and train."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build("llama").bfloat16()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            packed.support_avx512bf16_for_cpu = False
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], packed.to("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    adapter = get_peft_model(model, config(method, "llama"), autocast_adapter_dtype=False).train()
    added = {n: p for n, p in adapter.named_parameters() if ".default." in n}
    assert {p.dtype for p in added.values()} == {torch.bfloat16}
    batch = padded(ROWS[:1], "right")
    adapter(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in added.values())


def test_registration() -> None:
    """Importing the package is enough for PEFT to know the methods by the names in the files."""
    for name in ("HYBRID", "BITFIT", "REFT", "SOFT_PROMPT"):
        assert PeftType(name).value == name
        assert json.dumps(PeftType(name)) == f'"{name}"'
        assert copy.deepcopy(PeftType(name)) is PeftType(name)
    assert pipeline.adapters.hybrid.HybridConfig(prefix_modules=["q_proj"]).peft_type == "HYBRID"
