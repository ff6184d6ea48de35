"""Parameters and bytes per rank against numbers worked out by hand from hyper-parameters and from what each library holds."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipeline import memory
from pipeline.config.recipe import load
from pipeline.config.schema import Adapter
from pipeline.errors import UserError
from pipeline.memory import Need, adapters, fit, phases

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QWEN, OPT, LLAMA = "Qwen/Qwen2.5-0.5B", "facebook/opt-350m", "meta-llama/Meta-Llama-3-8B"
QWEN_ALL, OPT_ALL, LLAMA_ALL = 494_032_768, 331_196_416, 8_030_261_248
LLAMA_HEAD = 128_256 * 4096
# r = 16 on each of 24 blocks: q 16 x 1792, k and v 16 x 1024, o 16 x 1792, gate, up and down 16 x 5760.
QWEN_LORA = 24 * 16 * (2 * 1792 + 2 * 1024 + 3 * 5760)
GIB = 2**30


def need(folder: Path, stage: str, model: str, kind: Literal["cpu", "cuda"] = "cuda", **changes: Any) -> Need:
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
    return memory.estimate(load(path), stage, CONFIGS, kind)


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
    assert adapters.trained(Adapter(r=16), shape) == QWEN_LORA == 8_798_208
    assert adapters.trained(Adapter(r=16, targets=["q_proj", "v_proj"]), shape) == 24 * 16 * (1792 + 1024)


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
    assert (found.parameters, found.trained) == (LLAMA_ALL, trained)
    step = found.phases["step"]
    assert step.weights == pytest.approx(linear * 0.516 + (LLAMA_ALL - linear) * 2, rel=1e-9)
    assert step.adapters == trained * 2
    assert step.gradients == trained * 2 / 8
    # Master copy and two moments; for the step a flat 16-bit copy of the gradients, a float32 one, Adam's one temporary.
    assert step.optimizer == trained * (4 + 8 + 2 + 4 + 4) / 8
    assert step.framework == GIB / 2


def test_reward_model_has_a_score_head_in_place_of_the_output_head(tmp_path: Path) -> None:
    found = need(tmp_path, "reward", LLAMA)
    assert found.parameters == LLAMA_ALL - LLAMA_HEAD
    assert found.trained == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 4096


def test_lora_ppo_holds_one_copy_and_trains_two_adapters_and_a_head(tmp_path: Path) -> None:
    found = need(tmp_path, "ppo", QWEN)
    trained = 2 * QWEN_LORA + 896
    assert (found.parameters, found.trained) == (QWEN_ALL, trained)
    # One rank, bf16: the base, four adapters and two score heads; master copy and two moments.
    scoring = found.phases["scoring"]
    assert (scoring.weights, scoring.adapters) == (2 * QWEN_ALL, 2 * (4 * QWEN_LORA + 2 * 896))
    assert (scoring.gradients, scoring.optimizer) == (0, 12 * trained)


@pytest.mark.parametrize(
    ("critic", "parameters", "trained"),
    [
        ({"kind": "head"}, QWEN_ALL, QWEN_LORA + 896),
        ({"kind": "model"}, 2 * QWEN_ALL, QWEN_LORA + QWEN_ALL + 896),
        ({"kind": "adapter", "init": "policy"}, QWEN_ALL, 2 * QWEN_LORA + 896),
    ],
)
def test_critic_is_a_head_a_model_or_an_adapter(
    critic: dict[str, str], parameters: int, trained: int, tmp_path: Path
) -> None:
    found = need(tmp_path, "ppo", QWEN, ppo={"critic": critic})
    assert (found.parameters, found.trained) == (parameters, trained)


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
    scoring = shared.phases["scoring"]
    assert (scoring.weights, scoring.adapters) == (2 * QWEN_ALL, 2 * (3 * QWEN_LORA + 896))
    assert need(tmp_path, "evaluate", OPT, adapter={"method": "full"}).parameters == 3 * OPT_ALL


def test_evaluate_reads_pairs_with_the_reward_models_it_tests(tmp_path: Path) -> None:
    """No policy is held: one base for two adapters, and a model from outside. Activations grow with the longest text."""
    alone: dict[str, Any] = {"model": None, "against": None, "reward": [], "prompts": []}

    def reading(length: int) -> Need:
        of = ["reward", {"model": OPT}]
        asked = {"of": of, "data": [{"path": "d"}], "max_length": length}
        return need(tmp_path, "evaluate", QWEN, evaluate={**alone, "reward_model": asked})

    short, long = reading(300), reading(600)
    assert list(short.phases) == ["reading"]
    assert (short.parameters, short.trained) == (QWEN_ALL + OPT_ALL, 0)
    assert short.phases["reading"].adapters == 2 * (QWEN_LORA + 896 + 512)
    assert long.phases["reading"].activations == pytest.approx(short.phases["reading"].activations * 601 / 301)


@pytest.mark.parametrize(
    ("config", "weights", "gradients", "optimizer"),
    [
        # Bytes per parameter on each rank of two GPUs, bf16, OPT-350M in full, in its step: weights; gradients; then master
        # copy and moments, and for the step a float32 copy of the gradients and Adam's temporary, with ZeRO a flat one too.
        ("zero0", 2, 2, 12 + 4 + 4),
        ("zero1", 2, 2, (12 + 2 + 4 + 4) / 2),
        ("zero2", 2, 2 / 2, (12 + 2 + 4 + 4) / 2),
        ("zero3", 2 / 2, None, (12 + 2 + 4 + 4) / 2),
        ("zero2_offload", 2, 0, 0),
        ("zero3_offload", 0, None, 0),
    ],
)
def test_zero_stage_decides_what_is_sharded(
    config: str, weights: float, gradients: float | None, optimizer: float, tmp_path: Path
) -> None:
    found = need(tmp_path, "sft", OPT, adapter={"method": "full"}, deepspeed={"config": config, "num_gpus": 2})
    step = found.phases["step"]
    assert (step.weights, step.optimizer) == (weights * OPT_ALL, pytest.approx(optimizer * OPT_ALL))
    if (
        gradients is None
    ):  # the partition (offloaded with the optimizer), and the bucket of 200 million that it came through
        partition = 0 if config == "zero3_offload" else OPT_ALL / 2
        assert step.gradients == (partition + 200_000_000) * 2
    else:
        assert step.gradients == gradients * OPT_ALL


def test_deepspeed_file_of_ones_own_counts_as_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    sizes = [
        need(tmp_path, "sft", OPT, adapter={"method": "full"}, deepspeed={"config": config, "num_gpus": 2}).phases[
            "step"
        ]
        for config in ("mine.json", "zero3")
    ]
    assert (sizes[0].weights, sizes[0].optimizer) == (sizes[1].weights, sizes[1].optimizer)
    # DeepSpeed's own bucket is larger than the shipped one: all parameters fit into it.
    assert sizes[0].gradients - sizes[1].gradients == (OPT_ALL - 200_000_000) * 2


def test_unknown_deepspeed_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"deepspeed\.config: no configuration \"zer2\""):
        need(tmp_path, "sft", OPT, deepspeed={"config": "zer2"})


# A model that can be worked out on paper: 3 blocks, 8 wide, 4 heads of 2 (two of keys), 20 inside, 100 tokens.
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "dtype": "float32",
}
# q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 20; two embeddings; two norms of 8 in a block and a last one.
TINY_LINEAR = 3 * (2 * 64 + 2 * 32 + 3 * 160)
TINY_ALL = TINY_LINEAR + 2 * 800 + 7 * 8


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("size", "adapter", "masked", "numbers"),
    [
        # float32, LoRA everywhere: two inputs of norms, queries and output, keys and values, gate, silu and up; what
        # adapters read: the inputs of q, k, v, of gate and up, and of down; r for each of the 7 layers; a number per head.
        (4, Adapter(r=2), False, 4 * (2 * 8 + 2 * 8 + 2 * 4 + 3 * 20 + 8 + 8 + 20 + 7 * 2) + 4 * 4),
        # bf16: norms keep their inputs in float32; a mask repeats keys and values for each head of queries.
        (2, Adapter(r=2), True, 4 * 2 * 8 + 2 * (2 * 8 + 2 * 8 + 3 * 20 + 8 + 8 + 20 + 7 * 2) + 4 * 4),
        # Only q and v are adapted: the feed-forward's inputs are kept by no one.
        (4, Adapter(r=2, targets=["q_proj", "v_proj"]), False, 4 * (2 * 8 + 2 * 8 + 2 * 4 + 60 + 8 + 2 * 2) + 4 * 4),
        # Everything trains: no r, and what the two norms scale.
        (4, None, False, 4 * (2 * 8 + 2 * 8 + 2 * 4 + 60 + 8 + 8 + 20 + 2 * 8) + 4 * 4),
    ],
    ids=["LoRA", "masked bf16", "two targets", "full"],
)
def test_what_a_block_keeps_of_a_token(size: int, adapter: Adapter | None, masked: bool, numbers: int) -> None:
    assert memory.shape(TINY, "test").kept(size, adapter, masked=masked) == 3 * numbers


def test_other_families_keep_other_tensors() -> None:
    """GPT-2 in float32, full: queries, output, keys, values; inputs of two LayerNorms and of two projections; the four
    steps of its GELU, and its output; a number for each of 2 heads."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    assert memory.shape(gpt2, "test").kept(4, None, masked=False) == 2 * (4 * (4 * 8 + 2 * 8 + 2 * 8 + 5 * 32) + 4 * 2)
    # Qwen3 has norms of queries (8) and keys (4): their inputs, and what they scale.
    plain, normed = (memory.shape({**TINY, "model_type": kind}, "test") for kind in ("llama", "qwen3"))
    assert normed.kept(2, None, masked=False) - plain.kept(2, None, masked=False) == 3 * (8 + 4) * (4 + 2)


def test_activations_of_ppo_are_those_of_policy_and_critic(tiny: str, tmp_path: Path) -> None:
    sampling = {"max_prompt_length": 6, "max_response_length": 4}
    ppo = {"rollout_batch": 8, "micro_batch": 2, "sampling": sampling}
    options = {"base": {"model": tiny, "dtype": "fp32"}, "adapter": {"r": 2}, "deepspeed": {"config": "zero1"}}
    found = need(tmp_path, "ppo", tiny, ppo=ppo, **options)
    token = 3 * (4 * (2 * 8 + 2 * 8 + 2 * 4 + 3 * 20 + 8 + 8 + 20 + 7 * 2) + 4 * 4)
    backward = found.phases["backward"]
    assert backward.activations == 2 * (2 * 10) * token
    assert backward.logits == 0, "a frozen head's gradient is there before the critic's activations are"
    learning = need(tmp_path, "ppo", tiny, ppo=ppo | {"entropy_coef": 0.01}, **options).phases["backward"]
    assert learning.logits == 2 * 4 * 100 * 4  # one chunk, scaled, waits for its backward pass
    lora = 3 * 2 * (2 * 16 + 2 * 12 + 3 * 28)
    alone = need(tmp_path, "ppo", tiny, ppo=ppo, **options | {"deepspeed": {"config": "zero0"}}).phases["backward"]
    assert alone.gradients == 4 * (2 * lora + 8)  # earlier micro-batches' gradients, whole without ZeRO
    # Without ZeRO the policy's backward pass comes first: its chunk of logits, log-probabilities and probabilities on top.
    assert (alone.activations, alone.logits) == (20 * token, 2 * 4 * 100 * (4 + 4 + 4))

    checkpointing = need(tmp_path, "ppo", tiny, ppo=ppo | {"gradient_checkpointing": True}, **options)
    # The input of each block, and one block in full, of both roles.
    assert checkpointing.phases["backward"].activations == 2 * (2 * 10) * (3 * 8 * 4 + token / 3)
    head = need(tmp_path, "ppo", tiny, ppo=ppo | {"critic": {"kind": "head"}}, **options)
    # Without activations of a critic a chunk of logits, log-probabilities and probabilities comes on top of the policy's.
    assert head.phases["backward"].activations == 20 * token
    assert head.phases["backward"].logits == 2 * 4 * 100 * (4 + 4 + 4)


def test_rollout_holds_a_cache_of_its_slots(tiny: str, tmp_path: Path) -> None:
    sampling = {"max_prompt_length": 20, "max_response_length": 30, "batch": 4}
    base = {"model": tiny, "dtype": "fp32"}
    rollout = need(tmp_path, "ppo", tiny, ppo={"sampling": sampling}, base=base).phases["rollout"]
    # 49 columns, rounded to 64; keys and values of 4 numbers in 3 blocks.
    assert rollout.cache == 4 * 64 * 3 * 2 * 4 * 4
    assert rollout.logits == 4 * 100 * (4 + 4 + 4 + 8)
    # The prefill of 19 tokens for each slot: two tensors of 8 and three of 20, and one of 20 for the adapter.
    assert rollout.activations == 4 * 19 * (2 * 8 + 4 * 20) * 4
    few = need(tmp_path, "ppo", tiny, ppo={"sampling": sampling, "rollout_batch": 2}, base=base).phases["rollout"]
    assert few.cache == rollout.cache / 2
    on_cpu = need(tmp_path, "ppo", tiny, "cpu", ppo={"sampling": sampling}, base=base).phases["rollout"]
    assert on_cpu.cache == rollout.cache * 11 / 8  # the last responses go on in a copy of 3/4 of the keys


def test_chunk_of_logits_is_the_one_that_is_computed() -> None:
    source = Path(__file__).resolve().parents[2] / "pipeline" / "model" / "likelihood.py"
    assert "CHUNK_ELEMENTS = 2**24\n" in source.read_text(encoding="utf-8")
    assert phases.CHUNK_ELEMENTS == 2**24


def test_scoring_computes_at_most_a_chunk_of_logits(tmp_path: Path) -> None:
    scoring = need(tmp_path, "ppo", LLAMA).phases["scoring"]
    # 16 responses of 256 tokens would be 4096 rows of logits; 130 rows of 128256 are 2**24 elements.
    assert scoring.logits == 130 * 128_256 * (2 + 12)


def test_merged_copy_is_the_linear_layers_once_more(tiny: str, tmp_path: Path) -> None:
    base = {"model": tiny, "dtype": "fp32"}
    merged = need(tmp_path, "ppo", tiny, base=base, ppo={"sampling": {"adapter": "merged"}})
    assert merged.phases["rollout"].copy == 4 * TINY_LINEAR
    assert {parts.copy for name, parts in merged.phases.items() if name != "rollout"} == {0}, "gone after each rollout"
    recipe = load(tmp_path / "r.yaml", ["stages.ppo.sampling.adapter=auto"])
    assert memory.estimate(recipe, "ppo").phases["rollout"].copy == 0
    assert memory.merged_copy_fits(recipe, "ppo", (merged.bytes + 1) / 0.9, "cuda")
    assert not memory.merged_copy_fits(recipe, "ppo", (merged.bytes - 1) / 0.9, "cuda"), "a tenth stays free"


def test_a_cache_that_does_not_fit_is_refused_with_the_slots_that_do(tiny: str, tmp_path: Path) -> None:
    need(tmp_path, "ppo", tiny, ppo={"rollout_batch": 64, "sampling": {"max_response_length": 64, "batch": 64}})
    recipe = load(tmp_path / "r.yaml")
    whole = memory.estimate(recipe, "ppo").phases["rollout"].total
    memory.check_rollout(recipe, "ppo", memory.Device("cuda", whole, "a GPU"))
    few = memory.estimate(load(tmp_path / "r.yaml", ["stages.ppo.sampling.batch=24"]), "ppo").phases["rollout"].total
    with pytest.raises(UserError) as error:
        memory.check_rollout(recipe, "ppo", memory.Device("cuda", few, "a GPU"))
    assert "stages.ppo.sampling.batch" in str(error.value)
    assert "rollouts of 64 responses at a time need" in str(error.value)
    assert "fix: write `batch: 24`" in str(error.value)
    with pytest.raises(UserError, match="lower max_response_length, or use a larger device"):
        memory.check_rollout(recipe, "ppo", memory.Device("cuda", 1.0, "a GPU"))


def test_gradients_of_zero_2_pass_through_a_bucket_and_its_flat_copy(tiny: str, tmp_path: Path) -> None:
    options = {"base": {"model": tiny, "dtype": "fp32"}, "adapter": {"method": "full"}}
    sft = {"batch": 8, "micro_batch": 2}
    found = need(tmp_path, "sft", tiny, "cpu", sft=sft, deepspeed={"config": "zero2", "num_gpus": 2}, **options)
    # On CPUs the second bucket stays untouched; this rank's half waits from the first micro-batch.
    assert found.phases["reduction"].gradients == 4 * TINY_ALL * (1 + 1 + 1 / 2)
    assert found.phases["backward"].gradients == 4 * TINY_ALL / 2
    on_gpu = need(tmp_path, "sft", tiny, sft=sft, deepspeed={"config": "zero2", "num_gpus": 2}, **options)
    assert on_gpu.phases["reduction"].gradients == 4 * TINY_ALL * (2 + 1 + 1 / 2)
    assert on_gpu.phases["backward"].gradients == 4 * TINY_ALL * (2 + 1 / 2)


def test_second_bucket_fills_with_what_the_first_did_not_hold(tiny: str, tmp_path: Path) -> None:
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 3000}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    options = {
        "base": {"model": tiny, "dtype": "fp32"},
        "adapter": {"method": "full"},
        "sft": {"batch": 4, "micro_batch": 2},
    }
    place = {"config": "mine.json", "num_gpus": 2}
    assert TINY_ALL == 3672
    found = need(tmp_path, "sft", tiny, "cpu", deepspeed=place, **options)
    assert found.phases["reduction"].gradients == 4 * 2 * 3000  # the first and its flat copy; later 3000 + 672 + 1836
    # When it is full, the rest of the backward pass has 672 of 3672 gradients to go.
    kept = found.phases["backward"].activations
    assert found.phases["reduction"].activations == pytest.approx(kept * 672 / 3672)


def test_zero_3_shards_weights_and_gathers_them_to_compute(tiny: str, tmp_path: Path) -> None:
    options = {
        "base": {"model": tiny, "dtype": "fp32"},
        "adapter": {"method": "full"},
        "ppo": {"critic": {"init": "policy"}},
    }
    found = need(tmp_path, "ppo", tiny, "cpu", deepspeed={"config": "zero3", "num_gpus": 2}, **options)
    scoring = found.phases["scoring"]
    # Policy and reference speak; critic and reward model have no output head (800) and a score head of 8 each.
    assert scoring.weights == 4 * (4 * TINY_ALL - 2 * 800) / 2
    assert scoring.adapters == 4 * 2 * 8
    # 16 rows of 512 tokens through a block, and all weights twice: gathered, and cut into tensors.
    assert scoring.activations == 16 * 512 * (2 * 8 + 3 * 20) * 4 + 2 * TINY_ALL * 4
    token = 3 * (4 * (2 * 8 + 2 * 8 + 2 * 4 + 60 + 8 + 8 + 20 + 2 * 8) + 4 * 4)
    assert found.phases["backward"].activations == 2 * 16 * 512 * token + 2 * TINY_ALL * 4


def test_device_is_what_is_asked_for_else_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(tmp_path, "sft", QWEN, deepspeed={"config": "zero2", "num_gpus": 4})
    recipe = load(tmp_path / "r.yaml")
    assert memory.device(recipe, "sft", 24).bytes == 24 * GIB
    monkeypatch.setattr("pipeline.launch.devices", lambda: None)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 2**20}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    monkeypatch.setattr(fit, "LIMIT", tmp_path / "memory.max")
    for limit, share in ((None, 4), ("max", 4), (str(8 * GIB), 2)):  # of 16 GiB, or of 8, a quarter for each rank
        if limit is not None:
            (tmp_path / "memory.max").write_text(f"{limit}\n", encoding="utf-8")
        found = memory.device(recipe, "sft")
        assert (found.kind, found.bytes) == ("cpu", share * GIB)


LONG = {"micro_batch": 1, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("gib", "changes", "wanted"),
    [
        # Two roles keep 10 GiB each of 16 rows of 512 tokens; computing them again is the mildest change.
        (5.0, {"ppo": {"rollout_batch": 16}}, ["stages.ppo.gradient_checkpointing=true"]),
        # 64 slots of 8448 columns are 6.2 GiB of keys and values, and nothing that training does lowers that.
        (6.0, {"ppo": {**LONG, "sampling": {"max_response_length": 8192}}}, ["stages.ppo.sampling.batch=32"]),
    ],
)
def test_nearest_change_is_the_mildest_that_fits(
    gib: float, changes: dict[str, Any], wanted: list[str], tmp_path: Path
) -> None:
    need(tmp_path, "ppo", QWEN, **changes)
    recipe, device = load(tmp_path / "r.yaml"), memory.Device("cuda", gib * GIB, "a GPU")
    with pytest.raises(UserError, match=r"stages\.ppo: needs \d+\.\d\d GiB on each rank") as error:
        memory.check(recipe, "ppo", device, [], CONFIGS)
    assert error.value.fix.startswith(" ".join(f"--set {override}" for override in wanted))
    memory.check(load(tmp_path / "r.yaml", wanted), "ppo", device, wanted, CONFIGS)


def test_what_nothing_mends_is_said(tmp_path: Path) -> None:
    need(tmp_path, "sft", LLAMA)
    with pytest.raises(UserError, match="no setting is small enough"):
        memory.check(load(tmp_path / "r.yaml"), "sft", memory.Device("cuda", GIB / 2, "a GPU"), [], CONFIGS)


def test_only_visible_gpus_count(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A display card that the run does not see does not decide what fits."""
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  -L) echo 'GPU 0: large'; echo 'GPU 1: small';;\n"
        "  *'-i 0'*) echo 24576;;\n"
        "  *) echo 24576; echo 2048;;\n"
        "esac\n",
        encoding="utf-8",
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    need(tmp_path, "sft", tiny)
    recipe = load(tmp_path / "r.yaml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert memory.device(recipe, "sft").bytes == 24 * GIB
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert memory.device(recipe, "sft").bytes == 2 * GIB


def test_virtual_tokens_lengthen_every_text(tmp_path: Path) -> None:
    """20 virtual tokens before prompts of 256: keys and values of 20 columns more in every slot, rounded up to 16."""
    prompt = need(tmp_path, "ppo", QWEN, adapter={"method": "prompt_tuning", "num_virtual_tokens": 20})
    plain = need(tmp_path, "ppo", QWEN, adapter={"method": "p_tuning_v2", "num_virtual_tokens": 20})
    assert prompt.phases["rollout"].cache / plain.phases["rollout"].cache == pytest.approx(
        columns(256 + 20 + 256) / columns(256 + 256)
    )


def columns(tokens: int) -> int:
    return -(-(tokens - 1) // 16) * 16


def test_adalora_holds_two_means_for_every_weight(tmp_path: Path) -> None:
    adalora = need(tmp_path, "sft", QWEN, adapter={"method": "adalora", "init_r": 16, "target_r": 8}, ppo={"steps": 9})
    assert adalora.trained == QWEN_LORA + 24 * 7 * 16
    lora = need(tmp_path, "sft", QWEN, adapter={"method": "lora", "r": 16})
    extra = adalora.phases["backward"].optimizer - lora.phases["backward"].optimizer
    assert extra == pytest.approx(8 * adalora.trained + (adalora.trained - lora.trained) * 12)
