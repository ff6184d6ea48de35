"""Load tokenizers and base models the same way for every stage; pad never equals EOS; 4-bit layers keep their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError  # nosec B403 # nothing is unpickled
from typing import Any

import deepspeed
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema import Base
from pipeline.data import templates
from pipeline.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAD_NAMES = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|fim_pad|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)
DROPOUT = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "classifier_dropout",
    "layerdrop",
)
ADDED_PAD = "<|relay_pad|>"


def tokenizer(model: str, revision: str | None = None, *, trust: bool = False) -> Any:
    """The tokenizer of `model`, with a chat template (its own, else the default one) and a pad token that is not EOS: its own,
    else an unused special one, else an added one. `trust` is the recipe's `trust_remote_code` for that model."""
    try:
        # Left out, trust_remote_code asks at the terminal whether to run a model's code.
        loaded = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        check_code(model, error)
        raise UserError(
            f"base {model}",
            f"no tokenizer: {str(error).splitlines()[0]}",
            expected="tokenizer.json beside the weights",
            fix="check base.model",
        ) from None
    if loaded.eos_token_id is None:
        raise UserError(
            f"tokenizer of {model}",
            "it has no EOS token",
            expected="an EOS token, which ends a reply",
            fix="set eos_token in tokenizer_config.json",
        )
    if loaded.pad_token_id is None or loaded.pad_token_id == loaded.eos_token_id:
        vocabulary = loaded.get_vocab()
        spare = [
            t for t in PAD_NAMES if t in vocabulary and vocabulary[t] not in (loaded.eos_token_id, loaded.bos_token_id)
        ]
        if spare:
            loaded.pad_token = spare[0]
        else:
            loaded.add_special_tokens({"pad_token": ADDED_PAD})
    if loaded.chat_template is None:
        loaded.chat_template = templates.default(loaded)
    loaded.padding_side = "right"
    if backend := getattr(
        loaded, "backend_tokenizer", None
    ):  # what is published must not depend on how it was last called
        backend.no_padding()
        backend.no_truncation()
    return loaded


def check_code(model: str, error: Exception) -> None:
    """Say what to do about an `error` of transformers that asks for `trust_remote_code`."""
    if "custom code" in str(error):
        raise UserError(
            f"base {model}",
            "it comes with Python code of its own, which is not run unless the recipe says so",
            expected="a model that transformers has the code of",
            fix="read that code; if you trust it, write `trust_remote_code: true` beside `model:`, and the hub's `revision:`",
        ) from None


def causal(base: Base, tok: Any, *, sharded: bool) -> Any:
    """The causal language model `base`; `sharded` under ZeRO-3, where no device map may be given."""
    model = _load(AutoModelForCausalLM, base, sharded)
    _fit(model, tok)
    model.generation_config.pad_token_id = tok.pad_token_id
    model.generation_config.eos_token_id = sorted({tok.eos_token_id, *turn_ends(tok), *eos_ids(model)})
    return model


def turn_ends(tok: Any) -> list[int]:
    """What ends a turn in the chat template. A template that says nothing of it is refused where conversations are encoded."""
    try:
        return templates.ends(tok)
    except UserError:
        return []


def eos_ids(model: Any) -> list[int]:
    """The tokens that end a reply, from the model's generation config."""
    return listed(model.generation_config.eos_token_id)


def listed(ids: int | list[int] | None) -> list[int]:
    """Token ids as a generation config has them: none, one or several."""
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def classifier(base: Base, tok: Any, *, sharded: bool, labels: Sequence[str] = ()) -> Any:
    """A sequence classifier of `labels`, or with one output (the score); a head that `base` does not hold is drawn from
    torch's generator."""
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    model = _load(AutoModelForSequenceClassification, base, sharded, **(named if labels else {"num_labels": 1}))
    _fit(model, tok)
    return model


def _load(kind: Any, base: Base, sharded: bool, **extra: Any) -> Any:
    path, revision = base.model, base.revision
    options: dict[str, Any] = {
        "dtype": DTYPES[base.dtype],
        "attn_implementation": base.attn_implementation,
        "revision": revision,
        "trust_remote_code": base.trust_remote_code,
    }
    if base.quantization is not None:
        options["quantization_config"] = _nf4(base, sharded)
        if torch.cuda.is_available() and not sharded:
            options["device_map"] = {"": torch.cuda.current_device()}
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=base.trust_remote_code)
        model = kind.from_pretrained(path, config=_without_dropout(config, extra), **options)
    except UnpicklingError as error:  # of a .bin, which transformers reads by torch.load(weights_only=True)
        raise UserError(
            f"base {path}",
            f"its weights are a pickle that holds more than tensors: {str(error).strip().splitlines()[0]}",
            expected="safetensors, or a pickle of tensors alone",
            fix="do not use it unless you trust it; if you do, convert it to safetensors",
        ) from None
    except (OSError, ValueError, ImportError) as error:
        check_code(path, error)
        raise UserError(
            f"base {path}",
            f"cannot be loaded: {str(error).splitlines()[0]}",
            fix="check base.model, base.attn_implementation and base.quantization",
        ) from None
    if base.quantization is not None:
        _keep_gradients(model)
    return model


def _without_dropout(config: Any, extra: dict[str, Any]) -> Any:
    """`config` with `extra` and no dropout: PPO's ratio must be 1 before the first update, and a score must repeat."""
    for name in DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name, value in extra.items():
        setattr(config, name, value)
    return config


def _nf4(base: Base, sharded: bool) -> BitsAndBytesConfig:
    compute = DTYPES[base.dtype]
    # ZeRO-3 shards what has a floating-point dtype; on GPUs the packed weights are therefore stored as one.
    storage = compute if sharded and torch.cuda.is_available() else torch.uint8
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def _keep_gradients(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on AVX512-BF16 CPUs.

    One forward in eval mode would repack them for good, and training forwards after it would have wrong gradients
    (cosine 0.29 to the true ones, no warning).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _fit(model: Any, tok: Any) -> None:
    """Give the model rows for tokens that were added to the tokenizer, and tell its config which tokens pad and end."""
    before, needed = model.get_input_embeddings().num_embeddings, 1 + max([tok.pad_token_id, *templates.added(tok)])
    if needed > before:
        model.resize_token_embeddings(needed, mean_resizing=False)
        for layer in (
            model.get_input_embeddings(),
            model.get_output_embeddings(),
        ):  # in one order: collective under ZeRO-3
            if layer is not None:
                _mean_rows(layer.weight, before)
    if tok.pad_token == ADDED_PAD and model.get_output_embeddings() is not None:
        model.get_output_embeddings().register_forward_hook(_never(tok.pad_token_id))
    text = model.config.get_text_config()
    text.pad_token_id, text.eos_token_id = tok.pad_token_id, tok.eos_token_id
    model.config.use_cache = True


def _mean_rows(weight: torch.nn.Parameter, before: int) -> None:
    """Make the rows of `weight` [V, D] from `before` on the mean of those up to there.

    Who reads the published model without Relay then gives an added token that nobody trained at most the share
    1 / (before + 1): its logit is the mean logit, and exp(mean) is at most the mean of the exponentials. A random row can
    take any share.
    """
    with (
        torch.no_grad(),
        deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=hasattr(weight, "ds_id")),
    ):
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def _never(token: int) -> Callable[..., torch.Tensor]:
    """A hook on the output head that leaves an added token no probability: nobody trained its row."""

    def hook(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., token] = torch.finfo(logits.dtype).min
        return logits

    return hook


@contextmanager
def whole_weights() -> Iterator[None]:
    """Load unsharded although the stage runs under ZeRO-3: one rank alone would wait for the others for ever."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def _packed_conv1d(model: Any) -> list[str]:
    """Names of 4-bit layers that stand for GPT-2's Conv1D. They are linear, as is what dequantising makes of them."""
    return [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]


def _to_conv1d(model: Any, name: str) -> None:
    """Put a Conv1D, whose weights are transposed, in place of the linear layer `name`: what the architecture's files hold."""
    linear = model.get_submodule(name)
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight, layer.bias = torch.nn.Parameter(linear.weight.data.T.contiguous()), linear.bias
    model.set_submodule(name, layer)


def materialise(
    base: Base, baton: Any, target: Any, *, kind: str, labels: Sequence[str] = (), shard: str = "50GB"
) -> None:
    """Write the full model of an adapter baton to `target`: base in full precision, adapter merged, once.

    `kind` is `causal` or `classifier`, of `labels` where it has classes. The arithmetic is float32 and the result is in the
    base's dtype, in files of at most `shard`.
    """
    from peft import PeftConfig, PeftModel

    from pipeline.adapters.bitfit import unwritable_biases

    tok = AutoTokenizer.from_pretrained(baton.path, trust_remote_code=base.trust_remote_code)  # nosec B615 # a folder
    record = baton.manifest["base"]
    held = base.model_copy(
        update={
            "model": record["model"],
            "revision": record["revision"],
            "quantization": record["quantization"],
            "dtype": "bf16" if record["quantization"] else "fp32",
        }
    )
    config = PeftConfig.from_pretrained(str(baton.path))
    config.task_type = None  # PEFT refuses a language model's adapter on a classifier
    with whole_weights():
        speaks = kind == "causal"
        below = causal(held, tok, sharded=False) if speaks else classifier(held, tok, sharded=False, labels=labels)
        transposed = _packed_conv1d(below)
        if held.quantization is not None:  # what the adapter was trained on are the quantised weights' values
            below = below.dequantize()
        model = PeftModel.from_pretrained(below.float(), str(baton.path), config=config)
        merged = model.merge_and_unload().to(DTYPES[base.dtype])
        for name in transposed:
            _to_conv1d(merged, name)
        lost = unwritable_biases(merged)
    if lost:
        raise UserError(
            str(baton.path),
            f"merged, it has biases that {type(merged).__name__} has no place for: {lost[0]} and {len(lost) - 1} more",
            expected="an adapter whose weights the base's architecture holds",
            fix=f"train stage {baton.manifest['stage']} with `adapter: {{method: lora}}`",
        )
    merged.save_pretrained(target, max_shard_size=shard)
    tok.save_pretrained(target)
