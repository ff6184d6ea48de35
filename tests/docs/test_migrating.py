"""The tables for those who come from elsewhere: every key is one of the recipe, and no flag of DeepSpeed-Chat is left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline.config.kinds import KINDS
from pipeline.config.schema import Header, Source

pytestmark = pytest.mark.fast
DOCS = Path(__file__).resolve().parents[2] / "docs"

STEP_1 = """model_name_or_path per_device_train_batch_size per_device_eval_batch_size max_seq_len learning_rate weight_decay
num_train_epochs gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed gradient_checkpointing dropout
offload dtype zero_stage lora_dim lora_module_name only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard
tensorboard_path add_eot_token eot_token print_loss data_path data_split sft_only_data_path data_output_path local_rank"""
STEP_2 = "num_padding_at_beginning eval_interval eval_iters beta label_smoothing offload_reference_model"
STEP_3 = """unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef actor_model_name_or_path
critic_model_name_or_path per_device_generation_batch_size per_device_training_batch_size generation_batches ppo_epochs
max_prompt_seq_len max_answer_seq_len actor_learning_rate critic_learning_rate actor_weight_decay critic_weight_decay
preprocessing_num_workers enable_hybrid_engine unpin_actor_parameters release_inference_cache inference_tp_size
tp_gather_partition_size offload_reward_model actor_zero_stage critic_zero_stage actor_gradient_checkpointing
critic_gradient_checkpointing actor_dropout critic_dropout actor_lora_dim critic_lora_dim actor_lora_module_name
critic_lora_module_name actor_lora_learning_rate critic_lora_learning_rate enable_mixed_precision_lora enable_ema
align_overflow print_answers print_answers_interval enable_test_mode test_stop_step"""


def blocks(kind: Any) -> list[type[BaseModel]]:
    """The models that a type names."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [found for argument in get_args(kind) for found in blocks(argument)]


def has(models: list[type[BaseModel]], path: list[str]) -> bool:
    if not path:
        return True
    return any(
        path[0] in model.model_fields and has(blocks(model.model_fields[path[0]].annotation) or [model], path[1:])
        for model in models
    )


ROOTS: list[type[BaseModel]] = [Header, Source, *(kind.schema for kind in KINDS.values())]
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*")


def rows(page: str) -> list[list[str]]:
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in cells]


@pytest.mark.parametrize("page", ["migrate_deepspeed_chat.md", "migrate_trl.md", "migrate_llama_factory.md"])
def test_every_key_is_one(page: str) -> None:
    keys = [key for _, told in rows(page) for key in re.findall(r"`([^`]+)`", told.partition(";")[0])]
    keys = [key.partition(":")[0] for key in keys if not key.startswith(("-", "relay "))]
    keys = [key for key in keys if KEY.fullmatch(key)]
    values = {"sft", "reward", "ppo", "dpo", "kto", "pretrain", "dora", "rslora", "pissa", "freeze", "base", "static"}
    values |= {"metrics.jsonl"} | {f"zero{n}{more}" for n in range(4) for more in ("", "_offload")}
    assert len(keys) > 15
    unknown = [key for key in keys if key not in values and not has(ROOTS, key.split("."))]
    assert unknown == []


def test_every_flag_of_deepspeed_chat_is_told() -> None:
    told = {flag for flags, _ in rows("migrate_deepspeed_chat.md") for flag in re.findall(r"`--(\w+)`", flags)}
    flags = set(f"{STEP_1} {STEP_2} {STEP_3}".split())
    assert len(flags) > 70
    assert told == flags
