"""Rows of embeddings for added tokens: they alone train beside the adapter, tied ones stay one, plain PEFT reads the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.adapters import build, new_rows
from pipeline.config.schema import Adapter, Base, Sampling
from pipeline.data import templates
from pipeline.errors import UserError
from pipeline.generation import static
from pipeline.handoff import Baton
from pipeline.model import begin, load
from pipeline.model.roles import Role, Roles
from tests.support import tiny

LORA = Adapter(method="lora", r=2, alpha=4)
IDS = torch.tensor([[5, 511, 7, 9, 512, 3], [511, 8, 512, 6, 4, 17]])


def loaded(folder: Path, *, tied: bool, pad: bool = True) -> tuple[Any, Any, Path]:
    """(ChatML's model with rows for its two tokens, its tokenizer, the base's folder)."""
    base = tiny.model(folder / "base", "llama", tie_word_embeddings=tied)
    tok = load.tokenizer(str(base))
    if not pad:
        tok.pad_token = None
        tok.add_special_tokens({"pad_token": load.ADDED_PAD})
    templates.put(tok, "chatml")
    return load.causal(Base(model=str(base), dtype="fp32"), tok, sharded=False), tok, base


def moved(model: Any, name: str, seed: int = 0) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in build.trained(model, name):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_gets_mean_rows_once_and_stays_tied(tmp_path: Path, tied: bool) -> None:
    model, tok, base = loaded(tmp_path, tied=tied)
    plain = AutoModelForCausalLM.from_pretrained(base)
    for ours, theirs in (
        (model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        assert ours.weight.shape == (513, 64)
        assert torch.equal(ours.weight[:511], theirs.weight)
        torch.testing.assert_close(ours.weight[511:], theirs.weight.mean(0).expand(2, -1), atol=1e-6, rtol=1e-5)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert sorted(load.eos_ids(model)) == [1, 512]
    model.save_pretrained(tmp_path / "saved")
    again = load.causal(Base(model=str(tmp_path / "saved"), dtype="fp32"), tok, sharded=False)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_changes_the_adapter_and_the_new_rows_alone(tmp_path: Path, tied: bool) -> None:
    model, tok, _ = loaded(tmp_path, tied=tied)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    model = build.attach(model, LORA, "CAUSAL_LM", tokens=templates.added(tok)).train()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-5, rtol=1e-5)
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, kept[name])}
    rows = {name for name in changed if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if tied else 2)
    assert all("lora_B" in name for name in changed - rows)  # the gradient of A is zero while B is
    for name in rows:
        assert (kept[name] != dict(model.named_parameters())[name]).any(1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_reads_and_merges_what_is_published(tmp_path: Path, tied: bool) -> None:
    """Plain PEFT copies the matrix and sets rows in it: another way to the same logits."""
    model, tok, base = loaded(tmp_path, tied=tied)
    model = build.attach(model, LORA, "CAUSAL_LM", tokens=templates.added(tok)).eval()
    moved(model, "default")
    state = {name: value.detach() for name, value in model.named_parameters() if build.belongs(name, "default")}
    (tmp_path / "out").mkdir()
    build.write(model, "default", state, tmp_path / "out", str(base))
    other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    other.resize_token_embeddings(len(tok))
    other = PeftModel.from_pretrained(other, tmp_path / "out").eval()
    assert type(other.get_base_model().get_input_embeddings().token_adapter) is not new_rows.Rows
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        torch.testing.assert_close(ours, other(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
        head = model.get_base_model().get_output_embeddings()
        torch.testing.assert_close(head.weight[511:], other.get_base_model().get_output_embeddings().weight[511:])
        merged = other.merge_and_unload()
        torch.testing.assert_close(ours, merged(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    assert merged.get_input_embeddings().weight.shape == (513, 64)


def roles_on_one_base(folder: Path, *, tied: bool) -> Roles:
    plain, tok, _ = loaded(folder, tied=tied)
    model = plain
    for number, name in enumerate(("policy", "critic")):
        model = build.add(model, build.config(LORA, plain, "CAUSAL_LM", None, templates.added(tok)), name)
        moved(model, name, seed=number)
    roles = {"policy": Role("policy", "policy", True), "critic": Role("policy", "critic", True)}
    roles["reference"] = Role("policy", None, False)
    return Roles({"policy": model}, {}, roles).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_roles_on_one_base_have_rows_of_their_own(tmp_path: Path, tied: bool) -> None:
    roles = roles_on_one_base(tmp_path, tied=tied)
    names = list(roles.roles)
    with roles.evaluating():
        together = roles._hidden_of(names, IDS)
        alone = {name: roles._hidden(name, IDS) for name in names}
        for name in names:
            torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-5)
        assert len({round(float(alone[name][0, 1].sum()), 4) for name in names}) == 3
        # One token that is new, at a place where nothing came before: its row alone tells the roles' embeddings apart.
        layer = roles.causal_lm("policy").get_input_embeddings()
        for name in ("policy", "critic"):
            roles.use(name)
            row = layer.token_adapter.trainable_tokens_delta[name]
            assert torch.equal(layer(torch.tensor([511, 512])), row)


@pytest.mark.parametrize("tied", [True, False])
def test_rollouts_by_a_merged_copy_see_the_rows(tmp_path: Path, tied: bool) -> None:
    roles = roles_on_one_base(tmp_path, tied=tied)
    sampling = Sampling(max_response_length=6, batch=2)
    prompts = [[5, 511, 7], [512, 9]]
    with roles.evaluating():
        plain = {
            name: static.sample(roles.causal_lm(name), prompts, None, sampling, pad=0, eos=[512], slots=2)
            for name in ("policy", "critic")
        }
        for name, expected in plain.items():
            roles.sample_whole(name)
            asked = (name, prompts, None, sampling)
            found = roles.rollout(*asked, pad=0, eos=[512], synced=False)
            assert torch.equal(found.tokens, expected.tokens)
            torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


def published(folder: Path, *, tied: bool) -> tuple[Any, Any, Baton]:
    """(a trained model, its tokenizer, the baton that a stage would publish of it)."""
    model, tok, base = loaded(folder, tied=tied)
    model = build.attach(model, LORA, "CAUSAL_LM", tokens=templates.added(tok)).eval()
    moved(model, "default")
    record = {"model": str(base), "revision": None, "quantization": None}
    begin.writer(model, tok, record)(folder / "output")
    return model, tok, Baton(folder / "output", {"stage": "sft", "base": record})


@pytest.mark.parametrize("tied", [True, False])
def test_a_parent_becomes_a_base_with_the_rows_in_it(tmp_path: Path, tied: bool) -> None:
    (tmp_path / "output").mkdir()
    model, _, baton = published(tmp_path, tied=tied)
    load.materialise(Base(model="", dtype="fp32"), baton, tmp_path / "whole", kind="causal")
    tok = load.tokenizer(str(tmp_path / "whole"))
    assert (templates.added(tok), templates.ends(tok)) == ([511, 512], [512])
    whole = load.causal(Base(model=str(tmp_path / "whole"), dtype="fp32"), tok, sharded=False)
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight) == tied


def test_a_reward_model_goes_on_with_a_policys_rows_but_for_the_head_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    model, tok, baton = published(tmp_path, tied=False)
    base = Base(model=baton.base, dtype="fp32")
    scorer = build.attach(load.classifier(base, tok, sharded=False), LORA, "SEQ_CLS", tokens=templates.added(tok))
    build.put(scorer, "default", build.read(baton.path)[0])
    ours = scorer.get_base_model().get_input_embeddings()(IDS)
    assert torch.equal(ours, model.get_base_model().get_input_embeddings()(IDS))


def test_what_training_ends_with_must_be_what_the_published_model_stops_on(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    _, tok, baton = published(tmp_path, tied=True)
    begin._check_stops(tok, baton)
    settings = tmp_path / "output" / "generation_config.json"
    assert json.loads(settings.read_text())["eos_token_id"] == [1, 512]
    settings.write_text(json.dumps({"eos_token_id": [1]}))
    with pytest.raises(UserError) as told:
        begin._check_stops(tok, baton)
    assert "training ends a reply with <|im_end|>, and generation stops on <eos>" in str(told.value)


def test_an_added_pad_stays_without_probability_beside_rows_that_train(tmp_path: Path) -> None:
    model, tok, _ = loaded(tmp_path, tied=False, pad=False)
    assert (tok.pad_token_id, templates.added(tok)) == (511, [512, 513])
    model = build.attach(model, LORA, "CAUSAL_LM", tokens=templates.added(tok)).eval()
    moved(model, "default")
    with torch.no_grad():
        shares = model(input_ids=IDS).logits.softmax(-1)
    assert float(shares[..., 511].max()) == 0.0
    assert float(shares[..., 512:].min()) > 0.0


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    model, *_ = loaded(tmp_path, tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(513))
    with pytest.raises(UserError, match="bias"):
        new_rows.indices(model, [511])
