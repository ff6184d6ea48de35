"""The score head of a reward model with every method's adapter, on every family: published and opened again it is the same to
the bit, and so is what it says of a text at its EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import pipeline.adapters  # noqa: F401 - all that plain PEFT needs of Relay
from pipeline import handoff
from pipeline.adapters import build
from pipeline.config.recipe import load as read_recipe
from pipeline.handoff import Baton
from pipeline.model import begin, load
from pipeline.model.assemble import assemble
from pipeline.stage import Context
from stages.ppo.assemble import parts
from tests.support import tiny
from tests.support.methods import CASES, FAMILIES, changes

pytestmark = pytest.mark.fast

NF4: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    ),
}
TEXTS = ("Anna visits the palace. What does she see?\nShe sees an old mirror.", "Tom asks.\nNo.")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny.model(folder / family, family, **tiny.WIDE[family]) for family in FAMILIES}


def published(context: Context, tok: Any) -> tuple[Any, Baton]:
    """A reward model as the stage builds it, its trained weights moved by noise as training would, and what is published."""
    torch.manual_seed(1)
    model, base = begin.model(context, None, tok, "classifier", sharded=False, steps=4, longest=64)
    with torch.no_grad():
        for parameter in build.trained(model, "default"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    record = {"block": {"adapter": context.block.adapter.model_dump()}, "parents": {}}
    facts = {"stage": "reward", "kind": "reward", "base": base, "inputs": record}
    handoff.publish(context.dir, begin.writer(model, tok, base), facts)
    return model.eval(), handoff.open_baton(context.dir)


ALL = [*CASES, *(("qlora", family) for family in FAMILIES)]


@pytest.mark.parametrize(("method", "family"), ALL, ids=map("-".join, ALL))
def test_round_trip(method: str, family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """By PPO, as one of the roles that it puts on the base; and by transformers and PEFT. QLoRA computes in bf16, whose steps
    are of 0.008 for scores of size 1."""
    base, allowed = bases[family], 0.05 if method == "qlora" else 2e-5
    more = {"stages__ppo__policy": "base", "stages__ppo__critic": {"init": "policy"}}
    recipe = read_recipe(str(tiny.recipe(tmp_path / "r.yaml", base, **changes(method, 0), **more)))
    tok = load.tokenizer(str(base))
    model, baton = published(Context(recipe, "reward", tmp_path, 0, 1, {}, {}), tok)
    rows = [tok(text)["input_ids"] + [tok.eos_token_id] for text in TEXTS]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [tok.pad_token_id] * (int(lengths.max()) - len(row)) for row in rows])
    batch = {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).long()}

    ppo = Context(recipe, "ppo", tmp_path, 0, 1, {}, {"reward": baton})
    roles = assemble(ppo, parts(ppo), tok, sharded=False, steps=4).eval()
    options = NF4 if method == "qlora" else {"dtype": torch.float32}
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **options)
    opened = PeftModel.from_pretrained(plain, str(baton.path)).eval()
    with torch.no_grad():
        trained = model(**batch).logits[:, 0].float()
        torch.testing.assert_close(roles("scores", "reward", tokens, lengths), trained, atol=allowed, rtol=0)
        torch.testing.assert_close(opened(**batch).logits[:, 0].float(), trained, atol=allowed, rtol=0)
    assert abs(float(trained[0] - trained[1])) > 1e-2
    head = model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(roles.heads["reward"].weight, head)
    assert torch.equal(opened.get_base_model().score.modules_to_save["default"].weight, head)
