"""Packed rows: each sees itself alone, so that logits, loss and gradients are those of the rows one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trl import pack_dataset

from pipeline.adapters import build
from pipeline.config.architectures import PACK
from pipeline.config.methods import METHODS
from pipeline.config.recipe import load
from pipeline.data.packed import Collator
from pipeline.errors import UserError
from tests.support import tiny
from tests.support.methods import adapter, options

pytestmark = pytest.mark.fast

LENGTHS = (9, 5, 1, 12, 7)
ROWS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
# Of each row the first third is prompt.
LABELS = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ROWS]
TOGETHER = [[0, 1, 2], [3, 4]]
"""Which rows share a sequence: 15 tokens and 19, so that the first is padded."""

LLAMA, QWEN2 = tiny.SHAPES["llama"], tiny.SHAPES["qwen2"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {**QWEN2, "head_dim": 16},
    "mistral": {**LLAMA, "sliding_window": 4},
    "gemma": {**LLAMA, "head_dim": 16},
    "gemma2": {**LLAMA, "head_dim": 16, "sliding_window": 4},
    "gemma3_text": {**LLAMA, "head_dim": 16, "sliding_window": 4},
    "phi3": LLAMA,
}


def batch() -> dict[str, torch.Tensor]:
    return Collator(pad=0)(
        [
            {
                "input_ids": [token for row in rows for token in ROWS[row]],
                "labels": [label for row in rows for label in LABELS[row]],
                "seq_lengths": [LENGTHS[row] for row in rows],
            }
            for rows in TOGETHER
        ]
    )


def apart(logits: torch.Tensor) -> list[torch.Tensor]:
    """Each row's logits out of those [2, 19, V] of the packed batch."""
    return [
        piece
        for sequence, rows in zip(logits, TOGETHER, strict=True)
        for piece in sequence[: sum(LENGTHS[row] for row in rows)].split([LENGTHS[row] for row in rows])
    ]


def alone(model: Any) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]


def together(model: Any) -> list[torch.Tensor]:
    given = batch()
    return apart(model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_of(family: str, attention: str) -> Any:
    if family in tiny.SHAPES:
        return tiny.build(family, attention)
    values = {key: value for key, value in FAMILIES[family].items() if key != "model_type"}
    tiny.SHAPES[family] = {"model_type": family, **values}
    try:
        return tiny.build(family, attention)
    finally:
        del tiny.SHAPES[family]


def test_collator_by_hand() -> None:
    found = Collator(pad=0)(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "seq_lengths": [3, 1]},
            {"input_ids": [9, 4], "labels": [9, 4], "seq_lengths": [2]},
            {"input_ids": [3, 3, 3, 3, 3], "labels": [3, 3, 3, 3, 3]},  # not packed: one row
        ]
    )
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 0], [9, 4, 0, 0, 0], [3] * 5]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert found["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, 4, -100, -100, -100], [-100, 3, 3, 3, 3]]


def test_rows_are_packed_whole() -> None:
    """Best fit decreasing into 8: 7; 5 and 3; 4, 2 and 2 of the lengths 5, 3, 7, 2, 4, 2."""
    lengths = [5, 3, 7, 2, 4, 2]
    rows = [[number] * length for number, length in enumerate(lengths)]
    found = pack_dataset(Dataset.from_dict({"input_ids": rows, "labels": rows}), 8, "bfd")
    assert sorted(found["seq_lengths"]) == [[4, 2, 2], [5, 3], [7]]
    for ids, labels, pieces in zip(found["input_ids"], found["labels"], found["seq_lengths"], strict=True):
        assert ids == labels
        assert [len(set(part.tolist())) for part in torch.tensor(ids).split(list(pieces))] == [1] * len(pieces)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, attention)
        for family in PACK
        for attention in ("sdpa", "eager")
        if (family, attention) != ("gemma2", "sdpa")
    ],
)
def test_logits_are_those_of_the_rows_alone(family: str, attention: str) -> None:
    model = model_of(family, attention)
    with torch.no_grad():
        for packed, single in zip(together(model), alone(model), strict=True):
            torch.testing.assert_close(packed, single, atol=1e-5, rtol=0.0)


def test_opt_cannot(tmp_path: Path) -> None:
    """Its attention mask knows no positions: if this fails, OPT packs, and belongs to PACK."""
    model = model_of("opt", "sdpa")
    with torch.no_grad():
        assert max(float((a - b).abs().max()) for a, b in zip(together(model), alone(model), strict=True)) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_loss_and_gradients_are_those_of_the_rows_alone(family: str) -> None:
    """The mean over all target tokens, of which a row's first token is none."""
    model = model_of(family, "sdpa")
    given = batch()
    targets = int((given["labels"] != -100).sum())
    assert targets == sum(sum(label != -100 for label in labels[1:]) for labels in LABELS)
    packed = model(**given, use_cache=False).loss
    wanted = [
        cross_entropy(logits[:-1], torch.tensor(labels[1:], dtype=torch.long), reduction="sum", ignore_index=-100)
        for logits, labels in zip(alone(model), LABELS, strict=True)
    ]
    single = torch.stack(wanted).sum() / targets
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=0.0)
    for (name, ours), theirs in zip(gradients(model, packed).items(), gradients(model, single).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].packs and name not in ("full", "qlora")])
def test_every_method_that_packs(method: str) -> None:
    torch.manual_seed(1)
    model = build.attach(model_of("llama", "sdpa"), adapter(method), "CAUSAL_LM", steps=10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for packed, single in zip(together(model.eval()), alone(model), strict=True):
            torch.testing.assert_close(packed, single, atol=2e-5, rtol=0.0)


def recipe(folder: Path, **changes: Any) -> Path:
    return tiny.recipe(folder / "r.yaml", folder / "base", stages__sft__packing=True, **changes)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].packs])
def test_methods_that_cannot_are_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=r"stages.sft.packing.*virtual tokens[\s\S]*method: p_tuning_v2"):
        load(recipe(tmp_path, adapter=options(method)))


def test_other_attention_and_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention flash_attention_2"):
        load(recipe(tmp_path, base__attn_implementation="flash_attention_2"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "opt"}', encoding="utf-8")
    with pytest.raises(UserError, match="packing on model_type 'opt'"):
        load(recipe(tmp_path))
