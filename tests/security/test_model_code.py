"""Python code that comes with a model runs only where the recipe says so, and then that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import cli
from pipeline.config.distill import Teacher
from pipeline.config.evaluate import Policy
from pipeline.config.recipe import load as load_recipe
from pipeline.config.recipe import trusted
from pipeline.config.schema import Base
from pipeline.data.show import _encoder
from pipeline.errors import UserError
from pipeline.handoff import model_hash
from pipeline.model import load
from stages.distill import teacher
from stages.evaluate import subject
from tests.support import tiny
from tests.support.session import Ranks

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({ran!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the model's code makes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path, ran: Path) -> Path:
    """The tiny Llama as a model with code of its own, for the model and for the tokenizer."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_llama, folder)
    (folder / "own.py").write_text(CODE.format(ran=str(ran)), encoding="utf-8")
    for name, changes in {
        "config.json": {
            "model_type": "own_llama",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        },
    }.items():
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def refused(error: pytest.ExceptionInfo[UserError], ran: Path) -> None:
    assert "it comes with Python code of its own" in str(error.value)
    assert "`trust_remote_code: true`" in str(error.value)
    assert not ran.exists()


def test_a_model_s_code_is_not_run_unasked(base: Path, tiny_llama: Path, ran: Path) -> None:
    with pytest.raises(UserError) as error:
        load.tokenizer(str(base))
    refused(error, ran)
    with pytest.raises(UserError) as error:
        load.causal(Base(model=str(base), dtype="fp32"), load.tokenizer(str(tiny_llama)), sharded=False)
    refused(error, ran)


def test_looking_at_data_runs_no_code(base: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asks at the terminal whether it may, as transformers does."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be loaded"):
        _encoder(str(base))
    assert not ran.exists()


def test_it_runs_where_the_recipe_says_so(base: Path, tiny_llama: Path, ran: Path) -> None:
    held = Base(model=str(base), dtype="fp32", trust_remote_code=True)
    tok = load.tokenizer(str(base), trust=True)
    model = load.causal(held, tok, sharded=False).eval()
    assert ran.exists()
    assert (type(model).__name__, type(tok).__name__) == ("OwnForCausalLM", "OwnTokenizer")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_code_is_part_of_what_a_base_is(base: Path) -> None:
    before = model_hash(str(base))
    (base / "own.py").write_text("print('another')\n", encoding="utf-8")
    assert model_hash(str(base)) != before


def test_the_base_s_key_is_not_that_of_other_models(base: Path, tiny_llama: Path, tmp_path: Path, ran: Path) -> None:
    """A policy to compare with and a teacher have keys of their own."""
    changes = {"base__trust_remote_code": True, "stages__sft__init": "base"}
    recipe = load_recipe(tiny.recipe(tmp_path / "r.yaml", tiny_llama, **changes))
    context: Any = SimpleNamespace(recipe=recipe, block=recipe.stages["sft"], stage="sft")
    assert context.block.base.trust_remote_code
    tok = load.tokenizer(str(tiny_llama))
    with pytest.raises(UserError) as error:
        subject.part(context, Policy(model=str(base)), tok)
    refused(error, ran)
    with pytest.raises(UserError) as error:
        teacher.check_vocabulary(context, Teacher(model=str(base)), tok)
    refused(error, ran)
    given: Any = SimpleNamespace(teacher=Teacher(model=str(base)), base=context.block.base)
    with pytest.raises(UserError) as error:
        load.causal(teacher._part(context, given).base, tok, sharded=False)
    refused(error, ran)
    found = subject.part(context, Policy(model=str(base), trust_remote_code=True), tok)
    assert found.base.trust_remote_code
    assert ran.exists()


def test_relay_run_says_whose_code_will_run(
    base: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(
        tmp_path / "r.yaml",
        base,
        base__trust_remote_code=True,
        stages__sft__data=[{"path": str(tmp_path / "none.jsonl")}],
    )
    with pytest.raises(UserError, match=r"none\.jsonl"):  # what comes next
        cli.run(str(recipe), run_dir=tmp_path / "run")
    assert f"Python code that comes with {base} will be run (trust_remote_code)" in capsys.readouterr().out.splitlines()
    assert not ran.exists(), "relay run itself has no need of it"
    assert trusted(load_recipe(recipe).stages["ppo"]) == [str(base)]


def test_a_stage_on_such_a_base(ranks: Callable[[int], Ranks], base: Path, tmp_path: Path, ran: Path) -> None:
    """Refused in a paragraph without the key; trained and published with it, and the line is in the log."""
    run, session = str(tmp_path / "run"), ranks(2)
    plain = tiny.recipe(tmp_path / "plain.yaml", base, stages__sft__steps=1)
    for message in session.call("tests.support.stages:refused", recipe=str(plain), stage="sft", run_dir=run):
        assert "it comes with Python code of its own" in message
    assert not ran.exists()
    asked = tiny.recipe(tmp_path / "asked.yaml", base, stages__sft__steps=1, base__trust_remote_code=True)
    session.call("tests.support.stages:run", recipe=str(asked), stage="sft", run_dir=run)
    assert ran.exists()
    manifest = json.loads((tmp_path / "run" / "sft" / "output" / "manifest.json").read_text())
    assert manifest["inputs"]["block"]["base"]["trust_remote_code"] is True
    log = (session.folder / "log.txt").read_text()
    assert log.count(f"sft: Python code that comes with {base} is run (trust_remote_code)") == 1
