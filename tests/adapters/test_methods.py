"""Every method on every family of models: sampling in a cache as in a full forward, padding, saving, resuming, recomputation.

One tiny model is built for each method and family, its adapter moved away from its start by noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.adapters import build
from pipeline.adapters.bitfit import unwritable_biases
from pipeline.config.methods import METHODS
from pipeline.config.recipe import load
from pipeline.config.schema import Adapter, Sampling
from pipeline.errors import UserError
from pipeline.generation import engines
from pipeline.memory import adapters, shape
from pipeline.model import begin
from pipeline.model.roles import Role, Roles
from pipeline.stage import Context
from tests.support import tiny
from tests.support.methods import CASES, FAMILIES, adapter

pytestmark = pytest.mark.fast

STILL: dict[str, dict[str, float]] = {
    "opt": {"dropout": 0.0},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
"""What switches a family's dropout off, as Relay does."""

PROMPTS = [[5, 9, 3], [7, 8, 60, 33, 2, 19], [40, 41, 42, 43, 44, 45, 46, 47]]
SAMPLING = Sampling(max_response_length=5, batch=2, temperature=0.7)


class Case(NamedTuple):
    method: str
    family: str
    roles: Roles


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest) -> Case:
    """`policy` with the method's adapter and `base` without, on one trunk."""
    method, family = request.param
    torch.manual_seed(1)
    trunk = build.attach(
        tiny.build(family, **STILL.get(family, {})), adapter(method), "CAUSAL_LM", name="policy", steps=100
    )
    with torch.no_grad():
        for parameter in build.trained(trunk, "policy"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    roles = {"policy": Role("policy", "policy", True), "base": Role("policy", None, False)}
    return Case(method, family, Roles({"policy": trunk}, {}, roles).eval())


def rows(texts: list[list[int]]) -> torch.Tensor:
    width = max(map(len, texts))
    return torch.tensor([text + [0] * (width - len(text)) for text in texts])


def hidden(roles: Roles, role: str, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return roles._hidden(role, tokens)


def test_parameters_are_those_of_the_formula(case: Case) -> None:
    roles = case.roles
    config = roles.causal_lm("policy").config.to_dict()
    trained = sum(parameter.numel() for parameter in roles.trainable("policy"))
    assert trained == adapters.trained(adapter(case.method), shape(config, "test"))


def test_a_rollout_says_what_a_full_forward_says(case: Case) -> None:
    """Log-probabilities of a rollout, in a cache and with prompts of unlike length together, against one forward of the
    finished rows; and the greedy tokens of both engines are the same."""
    roles, replies = case.roles, []
    roles.use("policy")
    for engine in ("hf", "static"):
        assert engines.unsupported(engine, roles.causal_lm("policy")) is None
        sampling = SAMPLING.model_copy(update={"engine": engine})
        found = roles("rollout", "policy", PROMPTS, None, sampling, pad=0, eos=[1], synced=False)
        asked = (found.tokens, found.prompt_lengths, found.lengths, found.logprobs.shape[1], SAMPLING.temperature)
        with torch.no_grad():
            logprobs, _ = roles("log_probs", "policy", *asked)
        torch.testing.assert_close(found.logprobs, logprobs, atol=1e-4, rtol=0)
        for row, prompt in enumerate(PROMPTS):  # no virtual token is left in what comes out
            assert found.tokens[row, : len(prompt)].tolist() == prompt
        replies.append([found.response(row) for row in range(len(PROMPTS))])
    assert replies[0] == replies[1]


def test_padding_on_either_side_changes_nothing(case: Case) -> None:
    """Through PEFT's own forward, as trainers and users call it; position ids given, as everywhere in Relay."""
    roles = case.roles
    roles.use("policy")
    model, text, pads = roles.trunks["policy"], PROMPTS[1], 4
    count = len(text)
    mask, none = torch.ones(1, count, dtype=torch.int64), torch.zeros(1, pads, dtype=torch.int64)
    places = torch.arange(count).unsqueeze(0)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([text]), attention_mask=mask, position_ids=places).logits
        left = model(
            input_ids=torch.tensor([[0] * pads + text]),
            attention_mask=torch.cat([none, mask], 1),
            position_ids=torch.cat([none, places], 1),
        ).logits
        right = model(
            input_ids=torch.tensor([text + [0] * pads]),
            attention_mask=torch.cat([mask, none], 1),
            position_ids=torch.arange(count + pads).unsqueeze(0),
        ).logits
    torch.testing.assert_close(left[:, -count:], alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(right[:, :count], alone, atol=1e-4, rtol=1e-5)


def test_the_adapter_counts_and_off_is_the_base(case: Case) -> None:
    roles = case.roles
    tokens = rows(PROMPTS)
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        plain = (
            tiny.build(case.family, **STILL.get(case.family, {}))
            .base_model(input_ids=tokens, position_ids=positions)
            .last_hidden_state
        )
    off, on = hidden(roles, "base", tokens), hidden(roles, "policy", tokens)
    if case.method != "pissa":  # which takes components out of the base
        torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-5)
    assert (on - off).abs().max() > 1e-3


def test_published_files_open_without_relays_roles(case: Case, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` gives the same hidden states, and so does an adapter that a next stage would go on with."""
    roles = case.roles
    trunk, tokens = roles.trunks["policy"], rows(PROMPTS[1:2])
    state = {n: p.detach() for n, p in trunk.named_parameters() if build.belongs(n, "policy")}
    state |= dict(build.factors(trunk, "policy"))
    build.write(trunk, "policy", state, tmp_path, "base")
    opened = PeftModel.from_pretrained(tiny.build(case.family, **STILL.get(case.family, {})), str(tmp_path)).eval()
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        roles.use("policy")
        expected = trunk(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        found = opened(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        if not METHODS[case.method].continued:
            return
        going_on = build.attach(
            tiny.build(case.family, **STILL.get(case.family, {})),
            adapter(case.method),
            "CAUSAL_LM",
            name="next",
            steps=100,
        ).eval()
        build.put(going_on, "next", build.read(tmp_path)[0])
        found = going_on(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_merging_gives_the_same_model(case: Case, tmp_path: Path) -> None:
    """Of a method that merges, the merged model says what the adapter on its base says, also when read from disk; of others
    merging is refused."""
    roles = case.roles
    trunk, tokens = roles.trunks["policy"], rows(PROMPTS[1:2])
    state = {n: p.detach() for n, p in trunk.named_parameters() if build.belongs(n, "policy")}
    state |= dict(build.factors(trunk, "policy"))
    (tmp_path / "adapter").mkdir()
    build.write(trunk, "policy", state, tmp_path / "adapter", "base")
    opened = PeftModel.from_pretrained(tiny.build(case.family, **STILL.get(case.family, {})), str(tmp_path / "adapter"))
    if not METHODS[case.method].mergeable:
        with pytest.raises(ValueError, match="merge"):
            opened.merge_and_unload()
        return
    with torch.no_grad():
        expected = opened.eval()(input_ids=tokens, use_cache=False).logits
        merged = opened.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4, rtol=1e-5)
        if case.method == "bitfit" and unwritable_biases(merged):
            # Qwen2 has no place for them, nor OPT where embeddings are projected: `load.materialise` refuses it.
            assert case.family in ("qwen2", "opt")
            return
        merged.save_pretrained(tmp_path / "merged")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(read(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4, rtol=1e-5)


def test_recomputed_activations_give_the_same_gradients(case: Case) -> None:
    roles = case.roles
    tokens, parameters = rows(PROMPTS), roles.trainable("policy")
    asked = (tokens, torch.tensor([1, 2, 3]), torch.tensor([2, 4, 5]), 5, 1.0)

    def gradients() -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        roles("log_probs", "policy", *asked)[0].sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    roles.train()
    plain = gradients()
    roles.checkpoint_activations()
    try:
        recomputed = gradients()
    finally:
        roles.causal_lm("policy").gradient_checkpointing_disable()
        roles.eval()
    assert sum(float(g.abs().sum()) for g in plain) > 0
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ranks_and_scales_by_layer() -> None:
    """A pattern names layers as PEFT does; the memory plan counts their ranks."""
    block = Adapter(r=4, alpha=8, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 32})
    model = build.attach(tiny.build("llama"), block, "CAUSAL_LM", name="policy")
    attention = model.get_base_model().model.layers[1].self_attn
    assert attention.q_proj.lora_A["policy"].weight.shape == (8, 64)
    assert attention.q_proj.scaling["policy"] == 32 / 8
    assert attention.k_proj.lora_A["policy"].weight.shape == (4, 64)
    assert attention.k_proj.scaling["policy"] == 8 / 4
    trained = sum(parameter.numel() for parameter in build.trained(model, "policy"))
    assert trained == adapters.trained(block, shape(model.config.to_dict(), "test"))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "qlora", "pissa")])
def test_fresh_weights_are_told_from_trained_ones(method: str) -> None:
    """What PPO's canary goes by: an adapter that changes something must show. Of norms and ReFT the weights do not tell."""
    model = build.attach(tiny.build("llama"), adapter(method), "CAUSAL_LM", name="policy", steps=100)
    assert build.is_identity(method, build.state(model, "policy")) == METHODS[method].identity
    with torch.no_grad():
        for parameter in build.trained(model, "policy"):
            parameter.add_(0.1)
    taken_for_granted = METHODS[method].peft in ("LN_TUNING", "REFT")
    assert build.is_identity(method, build.state(model, "policy")) == taken_for_granted


def test_texts_that_virtual_tokens_make_too_long_are_refused(tmp_path: Path) -> None:
    """Tiny models hold 128 tokens: 126 and 3 virtual ones are one too many."""
    block = {"method": "prompt_tuning", "num_virtual_tokens": 3}
    path = tiny.recipe(tmp_path / "r.yaml", tiny.model(tmp_path / "base"), adapter=block)
    context = Context(load(path), "sft", tmp_path, 0, 1, {}, {})
    begin._check_context(context, tiny.build("llama"), 125)
    with pytest.raises(UserError, match=r"126 tokens, and 3 virtual ones before it.*\n.*max_length: 125"):
        begin._check_context(context, tiny.build("llama"), 126)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].mixed])
@pytest.mark.parametrize("family", FAMILIES)
def test_roles_read_one_batch_as_each_does_alone(family: str, method: str) -> None:
    """Also in OPT, whose feed-forward layers are given the tokens of all rows as one list."""
    torch.manual_seed(1)
    trunk: Any = tiny.build(family, **STILL.get(family, {}))
    configs = {name: build.config(adapter(method), trunk, "CAUSAL_LM") for name in ("policy", "other")}
    for name, config in configs.items():
        trunk = build.add(trunk, config, name)
        with torch.no_grad():
            for parameter in build.trained(trunk, name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapters = {"policy": "policy", "base": None, "other": "other"}
    roles = Roles({"policy": trunk}, {}, {role: Role("policy", name, False) for role, name in adapters.items()}).eval()
    asked = (rows(PROMPTS), torch.tensor([1, 2, 3]), torch.tensor([2, 4, 5]), 5, 1.0)
    with torch.no_grad():
        together = roles.read(list(adapters), *asked)
        alone = {role: roles.log_probs(role, *asked)[0] for role in adapters}
    for role, said in alone.items():
        torch.testing.assert_close(together[role], said, atol=1e-4, rtol=0)
    assert (alone["policy"] - alone["other"]).abs().max() > 1e-2
