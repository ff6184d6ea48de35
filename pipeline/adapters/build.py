"""Attach, load and save adapters of every method. The files are PEFT's own, so that `PeftModel.from_pretrained` opens them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters import adalora, new_rows, pissa
from pipeline.adapters.bitfit import BitFitConfig
from pipeline.adapters.hybrid import HybridConfig
from pipeline.adapters.reft import ReftConfig
from pipeline.adapters.soft_prompt import SoftPromptConfig
from pipeline.config.architectures import names
from pipeline.config.fitting import check_modules
from pipeline.config.methods import METHODS
from pipeline.config.schema import Adapter
from pipeline.errors import UserError

HEADS = ("lm_head", "score", "embed_out")
WEIGHTS = "adapter_model.safetensors"
OWN = ("HYBRID", "BITFIT", "REFT", "SOFT_PROMPT")
"""Kinds of adapters that PEFT does not have."""

UNTRAINED = ("ranknum",)
"""Parameters of adapters that only count."""

Names = dict[str, tuple[str, ...]]


def targets(model: Any, wanted: str | list[str]) -> list[str]:
    """Names of the linear layers to adapt, sorted; `all-linear` is all of them but the output heads."""
    tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in tuned)
    adapted = {name for name, module in tuned.items() if not isinstance(module, TrainableTokensLayer)}
    plain = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith(inside)
    }
    linear = {name.rpartition(".")[2] for name in plain | adapted} - set(HEADS)
    if wanted == "all-linear":
        return sorted(linear)
    unknown = sorted(set(wanted) - linear)
    if unknown:
        raise UserError(
            "adapter.targets",
            f"this model has no linear layer {', '.join(unknown)}",
            expected="some of: " + ", ".join(sorted(linear)),
        )
    return sorted(wanted)


def config(adapter: Adapter, model: Any, task: str, steps: int | None = None, tokens: Sequence[int] = ()) -> PeftConfig:
    """PEFT's configuration of a fresh adapter for the transformers model `model`.

    `task` is CAUSAL_LM or SEQ_CLS; the latter keeps the score head with the adapter. `steps` are the optimizer steps it will
    train for, which AdaLoRA's schedule needs. `tokens` are those whose embeddings train beside it.
    """
    family = model.config.get_text_config().model_type
    check_modules(adapter, family, "adapter.modules")
    if _transposed(model) and not METHODS[adapter.method].conv1d:
        method = METHODS[adapter.method]
        raise UserError(
            "adapter.method", f"{adapter.method} on {family}: {method.why}", fix=f"write `method: {method.instead}`"
        )
    where = names(family, adapter.modules)
    if adapter.method == "adalora":
        built = adalora.config(adapter, steps or 0, targets(model, adapter.targets), task)
    else:
        built = _BUILDERS[METHODS[adapter.method].peft](adapter, model, where)
    built.task_type = task
    built.modules_to_save = ["score"] if task == "SEQ_CLS" else None
    if tokens:
        built.trainable_token_indices = new_rows.indices(model, tokens)
    return built


def _lora(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    return peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets(model, adapter.targets),
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
        init_lora_weights="pissa" if adapter.method == "pissa" else True,
        fan_in_fan_out=_transposed(model),
    )


def _vera(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    return peft.VeraConfig(
        r=adapter.r,
        target_modules=targets(model, adapter.targets),
        vera_dropout=adapter.dropout,
        d_initial=adapter.d_initial,
    )


def _ia3(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    return peft.IA3Config(
        target_modules=sorted({*where["key_value"], *where["feed_forward_output"]}),
        feedforward_modules=sorted(where["feed_forward_output"]),
        fan_in_fan_out=_transposed(model),
    )


def _oft(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    return peft.OFTConfig(
        r=0,
        oft_block_size=adapter.oft_block_size,
        module_dropout=adapter.dropout,
        target_modules=targets(model, adapter.targets),
    )


def _ln_tuning(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    return peft.LNTuningConfig(target_modules=sorted(where["norms"]))


def _bitfit(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    return BitFitConfig()


def _reft(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    blocks = [n for n, _ in model.named_modules() if n.rpartition(".")[2].isdigit()]
    lists = tuple(where["blocks"])
    found = [n for n in blocks if n.rpartition(".")[0].rpartition(".")[2] in lists]
    return ReftConfig(kind=adapter.method, r=adapter.r, target_modules=found)


def _soft_prompt(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    hidden = adapter.encoder_hidden_size if adapter.method == "p_tuning" else 0
    return SoftPromptConfig(num_virtual_tokens=adapter.num_virtual_tokens, encoder_hidden_size=hidden)


def _hybrid(adapter: Adapter, model: Any, where: Names) -> PeftConfig:
    """Bottlenecks, prefixes and LoRA on queries and values, as each method puts them together."""
    method, given = adapter.method, adapter.options
    after_attention = where["attention_output"] if method == "adapter_houlsby" else ()
    sequential = method in ("adapter_houlsby", "adapter_pfeiffer", "unipelt")
    parallel = method in ("adapter_parallel", "mam")
    prefixed = method in ("prefix_tuning", "p_tuning_v2", "mam", "unipelt")

    def placed(here: bool, *slots: tuple[str, ...]) -> list[str] | None:
        found = list(dict.fromkeys(name for slot in slots for name in slot))
        return found if here and found else None

    return HybridConfig(
        sequential_modules=placed(sequential, after_attention, where["feed_forward_output"]),
        parallel_modules=placed(parallel, where["feed_forward"]),
        parallel_inputs=placed(parallel, where["feed_forward_input"]),
        prefix_modules=placed(prefixed, where["query"]),
        lora_modules=placed(method == "unipelt", where["query_value"]),
        bottleneck_dim=adapter.bottleneck_dim,
        non_linearity=adapter.non_linearity,
        scaling=given.get("scaling", 1.0),
        dropout=adapter.dropout,
        init="houlsby" if method == "adapter_houlsby" else "zero",
        lora_r=given.get("r", 8),
        lora_alpha=given.get("alpha", 16.0),
        num_virtual_tokens=adapter.num_virtual_tokens,
        encoder_hidden_size=given.get("encoder_hidden_size", 0),
        gating=method == "unipelt",
    )


_BUILDERS: dict[str, Callable[[Adapter, Any, Names], PeftConfig]] = {
    "LORA": _lora,
    "VERA": _vera,
    "IA3": _ia3,
    "OFT": _oft,
    "LN_TUNING": _ln_tuning,
    "BITFIT": _bitfit,
    "REFT": _reft,
    "SOFT_PROMPT": _soft_prompt,
    "HYBRID": _hybrid,
}


def _transposed(model: Any) -> bool:
    """Whether the model's linear layers hold their weights transposed, as GPT-2's."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def attach(
    model: Any,
    adapter: Adapter,
    task: str,
    name: str = "default",
    steps: int | None = None,
    tokens: Sequence[int] = (),
) -> Any:
    """`model` with a fresh adapter `name`, in the base's dtype: DeepSpeed holds float32 master weights of what trains."""
    built = config(adapter, model, task, steps, tokens)
    wrapped = add(model, built, name)
    if adapter.method == "pissa":
        pissa.remember(wrapped, name)
    return wrapped


def add(model: Any, config: PeftConfig, name: str) -> Any:
    """`model`, plain or with adapters already, with one more fresh adapter in the base's dtype."""
    with new_rows.readable():
        model = _added(model, config, name)
    new_rows.refine(model)
    return _in_base_dtype(model, name)


def _added(model: Any, config: PeftConfig, name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    kept = {key: dict(getattr(model.base_model, key, {}).items()) for key in ("vera_A", "vera_B")}
    model.add_adapter(name, config, autocast_adapter_dtype=False)
    for key, factors in kept.items():  # PEFT forgets those of the adapters before
        for other, value in factors.items():
            getattr(model.base_model, key)[other] = value
    return model


def _in_base_dtype(model: PeftModel, name: str) -> PeftModel:
    """PEFT takes an adapter's dtype from the layer it is on, and float32 where that holds packed bytes."""
    dtype = new_rows.plain(model.get_base_model().get_input_embeddings()).weight.dtype
    for parameter in trained(model, name):
        parameter.data = parameter.data.to(dtype)
    return model


def frozen(folder: Path) -> PeftConfig:
    """The configuration of a published adapter."""
    return PeftConfig.from_pretrained(str(folder))


def without_dropout(config: PeftConfig) -> PeftConfig:
    """`config`, changed in place: PPO's ratio must be 1 before the first update."""
    for name in ("lora_dropout", "vera_dropout", "module_dropout", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def belongs(parameter: str, adapter: str) -> bool:
    """Whether a parameter of a PEFT model, by its full name, is one of `adapter`."""
    return adapter in parameter.split(".")


def trained(model: Any, adapter: str) -> list[nn.Parameter]:
    """The parameters that training `adapter` changes."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if belongs(name, adapter) and not set(name.split(".")) & set(UNTRAINED)
    ]


def is_identity(method: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the weights of a method's adapter change nothing, as those of most fresh ones; where weights alone do not tell
    (norms, ReFT) it is taken for granted."""
    kind = METHODS[method].peft
    last = {
        "LORA": "lora_B",
        "ADALORA": "lora_E",
        "VERA": "vera_lambda_b",
        "IA3": "ia3_l",
        "OFT": "oft_R",
        "BITFIT": "delta",
        "HYBRID": "up.",
    }.get(kind)
    if last is None or not METHODS[method].identity:
        return METHODS[method].identity
    start = 1.0 if kind == "IA3" else 0.0
    decisive = [value for name, value in weights.items() if last in name]
    return bool(decisive) and all(bool((value == start).all()) for value in decisive)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(adapter weights, head weights) of a published adapter; the head is `score.weight` when there is one."""
    weights = load_file(folder / WEIGHTS)
    head = {name.rpartition("score.")[2]: value for name, value in weights.items() if ".score." in name}
    return {name: value for name, value in weights.items() if ".score." not in name}, head


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    """The score head of a published full classifier, from whichever shard holds it."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found = {
                name.removeprefix("score."): weights.get_tensor(name)
                for name in weights.keys()  # noqa: SIM118
                if name.startswith("score.")
            }
        if found:
            return found
    raise UserError(str(folder), "no score head in its weights", expected="a reward model with `score.weight`")


def factors(model: PeftModel, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What PEFT publishes of adapter `name` beside its parameters, by name: VeRA's random factors."""
    for key in ("vera_A", "vera_B"):
        found = getattr(model.base_model, key, {})
        if name in found:
            yield f"base_model.{key}.{name}", found[name].detach().cpu()


def state(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """The weights of adapter `name` as a published file has them, before DeepSpeed shards anything."""
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in found.items()}


def put(model: PeftModel, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into adapter `name` of `model`; a head it trains stays. Raises UserError when they do not fit it."""
    heads = {  # PEFT fails on a state without the modules it saves whole
        f"{path}.{saved}": module.get_parameter(loaded).detach()
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for saved, loaded in module.adapter_state_dict_load_map(name).items()
    }
    known = {**heads, **new_rows.fitting(model, weights)}
    result = set_peft_model_state_dict(model, known, adapter_name=name)
    # Buffers are derived (OFT's indices) or there once for all layers (VeRA's factors); tied rows are there once too.
    needed = {key for key, _ in model.named_parameters()}
    missing = [
        key
        for key in result.missing_keys
        if belongs(key, name) and key in needed and not set(key.split(".")) & set(UNTRAINED)
    ]
    if result.unexpected_keys or missing:
        raise UserError(
            f"adapter {name}",
            f"its weights do not fit the base: {(result.unexpected_keys or missing)[0]}",
            expected="an adapter trained on this base",
        )


def put_head(model: PeftModel, name: str, head: dict[str, torch.Tensor]) -> None:
    """Copy a published score head into the one that adapter `name` trains."""
    trained = model.get_base_model().score.modules_to_save[name]
    with torch.no_grad():
        for key, value in head.items():
            trained.get_parameter(key).copy_(value)


def write(model: PeftModel, name: str, state: dict[str, torch.Tensor], folder: Path, base: str) -> None:
    """Write gathered adapter weights and their config, with lists sorted so that the same work gives the same bytes."""
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    found = model.peft_config[name].to_dict() | {"inference_mode": True, "base_model_name_or_path": base}
    weights, found = pissa.as_lora(model, weights, found)
    save_file({key: value.contiguous() for key, value in sorted(weights.items())}, folder / WEIGHTS, {"format": "pt"})
    plain = json.loads(json.dumps(found, default=_jsonable))
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    readme = (_README if plain["peft_type"] in OWN else "") + (
        _ROWS if new_rows.tokens_of(model.peft_config[name]) else ""
    )
    if readme:
        (folder / "README.md").write_text("# How to open this adapter\n" + readme, encoding="utf-8")


_README = """
PEFT does not have its method; Relay (`pip install relay-rlhf`) adds it:

```python
import pipeline.adapters  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder")  # base: see base_model_name_or_path in adapter_config.json
```
"""

_ROWS = """
It holds the embeddings of tokens that were added to the tokenizer. The base must have rows for them before PEFT opens it:

```python
tokenizer = AutoTokenizer.from_pretrained("this folder")
if base.get_input_embeddings().num_embeddings < len(tokenizer):
    base.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
