"""The files of an exported model: an adapter as it is or as LoRA, or a full model, merged, copied or in another dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.block import Dtype
from pipeline.config.fitting import known_config, unmergeable
from pipeline.config.glue import TASKS
from pipeline.config.methods import METHODS
from pipeline.config.schema import Base
from pipeline.errors import UserError
from pipeline.handoff import ADAPTER_CONFIG, MANIFEST, Baton
from pipeline.published import CLASSIFIERS

CARD = "README.md"
OTHERS = (MANIFEST, CARD, "predictions.jsonl")
"""What an output holds beside the model; the card says what is worth saying of it."""
SHARD = "5GB"
NAMES: dict[str | None, Dtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def adapter(baton: Baton, folder: Path, *, lora: bool = False) -> None:
    """Fill `folder`, which is not there yet, with the adapter as it was published; with `lora`, as the LoRA that equals it."""
    if lora:
        from pipeline.adapters.as_lora import convert

        convert(baton, folder)
        for name in OTHERS:
            (folder / name).unlink(missing_ok=True)
    else:
        shutil.copytree(baton.path, folder, ignore=shutil.ignore_patterns(*OTHERS))
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    if (base := Path(config["base_model_name_or_path"])).is_dir():  # a relative one would not be found from elsewhere
        config["base_model_name_or_path"] = str(base.resolve())
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def full(baton: Baton, folder: Path, *, dtype: Dtype | None = None, shard: str | None = None) -> None:
    """Fill `folder` with the whole model: an adapter merged into its base, in float32 and once, a full
    model copied. `dtype` is the base's, or the full model's own, unless given; a file of weights holds at most `shard`."""
    if baton.is_adapter:
        _merged(baton, folder, dtype, shard or SHARD)
    elif shard is None and dtype in (None, stored_in(baton.path)):
        shutil.copytree(baton.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*OTHERS))
    else:
        _again(baton, folder, dtype or stored_in(baton.path), shard or SHARD)


def check_merges(baton: Baton) -> None:
    """Raise UserError for an adapter that cannot become part of its base."""
    family = known_config(baton.base).get("model_type")
    if baton.is_adapter and (why := unmergeable(baton.adapter, family)) is not None:
        raise UserError(
            f"stage {baton.manifest['stage']}",
            f"its {baton.adapter.method} adapter cannot become part of the base: {why}",
            expected="a full model, or an adapter that merges",
            fix=f"export the adapter, without --merge; or train with method {METHODS[baton.adapter.method].instead}",
        )


def is_classifier(baton: Baton) -> bool:
    return baton.manifest["kind"] in CLASSIFIERS


def labels(baton: Baton) -> tuple[str, ...]:
    """The classes of a classify stage; none for a score, a number or a policy."""
    task = baton.manifest["inputs"]["block"].get("task")
    return TASKS[task].labels if task is not None else ()


def held(baton: Baton) -> Base:
    """The base as the stage's recipe had it: its precision, and whether code of its own may run."""
    return Base.model_validate(baton.manifest["inputs"]["block"]["base"])


def stored_in(folder: Path) -> Dtype:
    """The dtype of the weights in a `save_pretrained` folder, by its config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return NAMES.get(config.get("dtype") or config.get("torch_dtype"), "fp32")


def _merged(baton: Baton, folder: Path, dtype: Dtype | None, shard: str) -> None:
    from pipeline import engine
    from pipeline.model import load

    engine.quiet()
    base = held(baton)
    base = base.model_copy(update={"dtype": dtype or base.dtype})
    load.materialise(
        base,
        baton,
        folder,
        kind="classifier" if is_classifier(baton) else "causal",
        labels=labels(baton),
        shard=shard,
    )


def _again(baton: Baton, folder: Path, dtype: Dtype, shard: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from pipeline import engine
    from pipeline.model.load import DTYPES

    engine.quiet()
    trust: dict[str, Any] = {"trust_remote_code": held(baton).trust_remote_code}
    kind = AutoModelForSequenceClassification if is_classifier(baton) else AutoModelForCausalLM
    model = kind.from_pretrained(baton.path, dtype=DTYPES[dtype], **trust)
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(baton.path, **trust).save_pretrained(folder)  # nosec B615 # a folder
