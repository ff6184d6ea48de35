"""Parameters and bytes per rank against numbers worked out by hand from the published hyper-parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import memory
from pipeline.config.recipe import load
from pipeline.config.schema import Adapter
from pipeline.errors import UserError
from pipeline.memory import Need

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QWEN, OPT, LLAMA = "Qwen/Qwen2.5-0.5B", "facebook/opt-350m", "meta-llama/Meta-Llama-3-8B"
QWEN_ALL, OPT_ALL, LLAMA_ALL = 494_032_768, 331_196_416, 8_030_261_248
LLAMA_HEAD = 128_256 * 4096
# r = 16 on each of 24 blocks: q 16 x 1792, k and v 16 x 1024, o 16 x 1792, gate, up and down 16 x 5760.
QWEN_LORA = 24 * 16 * (2 * 1792 + 2 * 1024 + 3 * 5760)
GIB = 2**30


def need(folder: Path, stage: str, model: str, **changes: Any) -> Need:
    """The estimate for a stage of a chain on `model`; `changes` are keys of the recipe, or blocks of its stages."""
    stages: dict[str, dict[str, Any]] = {
        "sft": {"kind": "sft", "lr": 1e-4, "data": [{"path": "d"}]},
        "reward": {"kind": "reward", "lr": 1e-4, "data": [{"path": "d"}]},
        "ppo": {"kind": "ppo", "policy": "sft", "reward": "reward", "lr": 1e-5, "steps": 1, "prompts": [{"path": "d"}]},
        "evaluate": {
            "kind": "evaluate",
            "model": "ppo",
            "against": "sft",
            "reward": ["reward"],
            "prompts": [{"path": "d"}],
        },
    }
    for name in stages:
        stages[name] |= changes.pop(name, {})
    recipe = {"name": "m", "base": {"model": model}, "stages": stages, **changes}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return memory.estimate(load(path), stage, CONFIGS)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # As counted by transformers for the models of these names on the hub.
        ({"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}, 124_439_808),
        (
            {
                "model_type": "gpt_neox",
                "vocab_size": 50304,
                "hidden_size": 512,
                "intermediate_size": 2048,
                "num_hidden_layers": 6,
            },
            70_426_624,
        ),
        (
            {
                "model_type": "qwen3",
                "vocab_size": 151936,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": True,
            },
            596_049_920,
        ),
        (
            {
                "model_type": "mistral",
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            7_241_732_096,
        ),
    ],
    ids=["gpt2", "pythia-70m", "Qwen3-0.6B", "Mistral-7B"],
)
def test_parameters_of_other_families(config: dict[str, Any], parameters: int) -> None:
    assert memory.shape(config, "test").parameters == parameters


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="model_type 'mamba'"):
        memory.shape({"model_type": "mamba"}, "test")


def test_lora_counts_only_the_layers_it_targets() -> None:
    shape = memory.shape(memory.read(QWEN, "test", CONFIGS), "test")
    assert shape.lora(Adapter(r=16)) == QWEN_LORA == 8_798_208
    assert shape.lora(Adapter(r=16, targets=["q_proj", "v_proj"])) == 24 * 16 * (1792 + 1024)


def test_qlora_stage_by_hand(tmp_path: Path) -> None:
    """Llama-3-8B in 4 bits on 8 ranks: the weights on each, gradients and states of the adapter shared out."""
    found = need(
        tmp_path,
        "sft",
        LLAMA,
        base={"model": LLAMA, "quantization": "nf4"},
        deepspeed={"config": "zero2", "num_gpus": 8},
    )
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    trained = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    size = linear * 0.516 + (LLAMA_ALL - linear) * 2 + trained * 2 + trained * (2 + 12) / 8
    assert (found.parameters, found.trained) == (LLAMA_ALL, trained)
    assert found.gib == pytest.approx(size / GIB, rel=1e-9)


def test_reward_model_has_a_score_head_in_place_of_the_output_head(tmp_path: Path) -> None:
    found = need(tmp_path, "reward", LLAMA)
    assert found.parameters == LLAMA_ALL - LLAMA_HEAD
    assert found.trained == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 4096


def test_lora_ppo_holds_one_copy_and_trains_two_adapters_and_a_head(tmp_path: Path) -> None:
    found = need(tmp_path, "ppo", QWEN)
    assert (found.parameters, found.trained) == (QWEN_ALL, 2 * QWEN_LORA + 896)
    # One rank, bf16: the base, four adapters and two score heads; then gradient, master copy and two moments.
    size = 2 * (QWEN_ALL + 4 * QWEN_LORA + 2 * 896) + (2 + 12) * (2 * QWEN_LORA + 896)
    assert found.gib == pytest.approx(size / GIB, rel=1e-9)


def test_full_ppo_holds_four_models_although_their_base_is_one(tmp_path: Path) -> None:
    found = need(tmp_path, "ppo", OPT, adapter={"method": "full"})
    assert (found.parameters, found.trained) == (4 * OPT_ALL, 2 * OPT_ALL + 512)


def test_ppo_on_another_reward_base_holds_both(tmp_path: Path) -> None:
    found = need(tmp_path, "ppo", QWEN, reward={"base": {"model": OPT}})
    # 24 blocks of four 1024 x 1024 and two 1024 x 4096 layers, and the two projections between 512 and 1024.
    lora = 16 * (24 * (4 * 2048 + 2 * 5120) + 2 * 1536)
    assert (found.parameters, found.trained) == (QWEN_ALL + OPT_ALL, QWEN_LORA + lora + 512)


def test_adapter_of_another_shape_is_merged_into_a_copy_of_its_own(tmp_path: Path) -> None:
    found = need(tmp_path, "ppo", QWEN, sft={"adapter": {"r": 8}})
    assert found.parameters == 2 * QWEN_ALL
    assert found.trained == 2 * QWEN_LORA + 896


def test_lora_on_models_trained_in_full_holds_both_of_them(tmp_path: Path) -> None:
    full = {"adapter": {"method": "full"}}
    found = need(tmp_path, "ppo", QWEN, sft=full, reward=full)
    assert (found.parameters, found.trained) == (2 * QWEN_ALL, 2 * QWEN_LORA + 896)


def test_evaluate_holds_every_model_it_compares_whole(tmp_path: Path) -> None:
    shared = need(tmp_path, "evaluate", QWEN, deepspeed={"config": "zero3", "num_gpus": 8})
    assert (shared.parameters, shared.trained) == (QWEN_ALL, 0)
    assert shared.gib == pytest.approx(2 * (QWEN_ALL + 3 * QWEN_LORA + 896) / GIB, rel=1e-9)
    assert need(tmp_path, "evaluate", OPT, adapter={"method": "full"}).parameters == 3 * OPT_ALL


@pytest.mark.parametrize(
    ("config", "size"),
    [
        # Per rank of two, bf16, OPT-350M in full: weights 2 bytes, gradients 2, master copy and moments 12.
        ("zero0", 2 + 2 + 12),
        ("zero1", 2 + 2 + 12 / 2),
        ("zero2", 2 + 2 / 2 + 12 / 2),
        ("zero3", (2 + 2 + 12) / 2),
        ("zero2_offload", 2 + 2 / 2),
        ("zero3_offload", 2 / 2),
    ],
)
def test_zero_stage_decides_what_is_sharded(config: str, size: float, tmp_path: Path) -> None:
    found = need(tmp_path, "sft", OPT, adapter={"method": "full"}, deepspeed={"config": config, "num_gpus": 2})
    assert found.gib == pytest.approx(size * OPT_ALL / GIB, rel=1e-9)


def test_deepspeed_file_of_ones_own_counts_as_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    sizes = [
        need(tmp_path, "sft", OPT, adapter={"method": "full"}, deepspeed={"config": config, "num_gpus": 2}).gib
        for config in ("mine.json", "zero3")
    ]
    assert sizes[0] == sizes[1]


def test_unknown_deepspeed_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"deepspeed\.config: no configuration \"zer2\""):
        need(tmp_path, "sft", OPT, deepspeed={"config": "zer2"})
