"""Tokens that a recipe adds through the whole chain: rows of their own in every role, read the same by plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_methods import OFTEN, forget_after_the_first_step
from tests.support import tiny
from tests.support.methods import changes
from tests.support.session import Ranks

Get = Callable[[int], Ranks]

NF4 = {"base__quantization": "nf4", "base__dtype": "bf16"}
CHAINS: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("lora", 2, False, {}),
    ("lora", 3, True, {}),
    ("lora", 2, True, NF4),
]
"""Method, ZeRO stage, whether the embeddings are tied, and what else the recipe says."""


def talks(folder: Path) -> dict[str, Any]:
    """The quickstart's data as conversations, and the recipe's keys that read it."""
    found = {}
    for stage, name in (("sft", "demonstrations"), ("reward", "preferences"), ("ppo", "prompts")):
        rows = []
        for line in (tiny.QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
            row = json.loads(line)
            talk = {"prompt": [{"role": "user", "content": row["prompt"].strip()}]}
            said = {key: [{"role": "assistant", "content": row[key].strip()}] for key in row.keys() - {"prompt"}}
            rows.append(json.dumps(talk | said) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        found[f"stages__{stage}__{'prompts' if stage == 'ppo' else 'data'}"] = [{"path": str(folder / f"{name}.jsonl")}]
    return found


@pytest.mark.parametrize(("method", "zero", "tied", "more"), CHAINS)
def test_chain(ranks: Get, tmp_path: Path, method: str, zero: int, tied: bool, more: dict[str, Any]) -> None:
    """SFT, reward model and PPO on ChatML; with embeddings that are not tied, PPO resumed after a step publishes the
    same bytes."""
    base = tiny.model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    resumed = () if tied else ("ppo",)
    often = {f"stages__{stage}__{key}": value for stage in resumed for key, value in OFTEN.items()}
    asked = {**changes(method, zero), **often, **talks(tmp_path), **more, "base__chat_template": "chatml"}
    recipe = str(tiny.recipe(tmp_path / "r.yaml", base, **asked, base__add_tokens=["<|tool|>"]))
    call = {"recipe": recipe, "run_dir": str(tmp_path / "run")}
    hashes = ranks(2).call("tests.support.stages:chain", **call)
    assert hashes[0] == hashes[1]
    for difference in ranks(2).call("tests.distributed.cases:opens_plainly", **call):
        assert max(difference.values()) <= (0.05 if more is NF4 else 2e-5), difference
    for stage in ("sft", "reward", "ppo"):
        check_published(tmp_path / "run" / stage / "output", head=not tied and stage != "reward")
    for stage in resumed:
        forget_after_the_first_step(tmp_path / "run" / stage)
        again = ranks(2).call("tests.support.stages:run", stage=stage, **call)
        assert again[0] == hashes[0][stage]


def check_published(output: Path, *, head: bool) -> None:
    """The three new rows of the embeddings, and of a `head` that is not tied to them, and no more of either."""
    weights = load_file(output / "adapter_model.safetensors")
    rows = {name: value for name, value in weights.items() if "trainable_tokens_delta" in name}
    assert sorted(name.split(".")[-3] for name in rows) == (["embed_tokens", "lm_head"] if head else ["embed_tokens"])
    assert {tuple(value.shape) for value in rows.values()} == {(3, 64)}
    # <|im_start|> and <|im_end|> are in every text, <|tool|> in none: its row is as all three began.
    start, end, unused = next(value for name, value in rows.items() if "embed_tokens" in name).float()
    assert not torch.equal(start, end)
    assert not torch.equal(start, unused)
    if output.parent.name == "reward":
        return
    settings = json.loads((output / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 512]
    assert (output / "chat_template.jinja").is_file()
    assert "resize_token_embeddings" in (output / "README.md").read_text()
