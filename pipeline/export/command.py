"""`relay export`: a published stage as a folder that other programs open."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline import completion
from pipeline.config.block import Dtype
from pipeline.errors import UserError
from pipeline.export import card, gguf, hub, model
from pipeline.export.lineage import hub_id
from pipeline.handoff import Baton, sync
from pipeline.published import open_model, run_folder

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="a run directory, the name of one in runs/, or its recipe", autocompletion=completion.runs
    ),
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="folder of the run, where RUN is a recipe run elsewhere")
]
Stage = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="default: the policy that no other one of the run was made from",
        autocompletion=completion.stages,
    ),
]


def export(
    run: Run,
    stage: Stage = None,
    merge: Annotated[bool, typer.Option("--merge", help="a full model: the adapter merged into its base")] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="the plain LoRA that equals the adapter, where one does")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="of a full model; default the base's")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="a new folder; default exports/<run>-<stage>")] = None,
    shard: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="of a file of weights, such as 2GB")
    ] = None,
    as_gguf: Annotated[bool, typer.Option("--gguf", help="beside it a file for llama.cpp, by its converter")] = False,
    gguf_type: Annotated[
        str | None,
        typer.Option("--gguf-type", metavar="TYPE", help="f32, f16, bf16, q8_0 or another of the converter's"),
    ] = None,
    repo: Annotated[str | None, typer.Option("--push-to-hub", metavar="REPO", help="upload it to OWNER/NAME")] = None,
    private: Annotated[bool, typer.Option("--private", help="to a private repository")] = False,
    run_dir: RunDir = None,
) -> None:
    """Write a stage's model as a folder that other programs open.

    With tokenizer, chat template and model card.
    """
    folder = run_folder(run, run_dir)
    baton = open_model(folder, stage)
    full = merge or as_gguf or not baton.is_adapter
    target = to or Path("exports") / f"{folder.resolve().name}-{baton.manifest['stage']}"
    _check_together(private and repo is None, gguf_type if not as_gguf else None, shard)
    _check(baton, target, full=full, lora=lora, dtype=dtype, shard=shard)
    if as_gguf and model.is_classifier(baton):
        raise UserError("--gguf", f"stage {baton.manifest['stage']} published a classifier", expected="a policy")
    start = gguf.converter() if as_gguf else []
    if repo is not None:
        _check_push(baton, repo, full=full)
    tell_of_code(baton)

    def fill(fresh: Path) -> None:
        if full:
            model.full(baton, fresh, dtype=dtype, shard=shard)
        else:
            model.adapter(baton, fresh, lora=lora)
        if as_gguf:
            kind = gguf_type or gguf.TYPES[model.stored_in(fresh)]
            gguf.convert(start, fresh, fresh / f"{target.name}-{kind}.gguf", kind)
        card.write(folder, baton, fresh, form="full" if full else "lora" if lora else "adapter")

    whole(target, fill)
    method = "full model" if full else f"LoRA equal to the {baton.adapter.method} adapter" if lora else "adapter"
    print(f"{target}: {method} of {baton.manifest['stage']} ({baton.content_hash[:12]})", flush=True)
    if repo is not None:
        print(hub.push(target, repo, private=private), flush=True)


def whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` by `fill`, beside it first and then renamed: it is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fill(fresh)
        for file in fresh.rglob("*"):
            sync(file)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync(target.parent)


def tell_of_code(baton: Baton) -> None:
    """Say so where the base comes with Python code that will run."""
    if model.held(baton).trust_remote_code:
        print(f"Python code that comes with {baton.base} will be run (trust_remote_code)", flush=True)


def _check_together(private: bool, gguf_type: str | None, shard: str | None) -> None:
    """Refuse an option without the one that it belongs to, and a size that is none."""
    if private:
        raise UserError("--private", "nothing is pushed", fix="--push-to-hub OWNER/NAME")
    if gguf_type is not None:
        raise UserError(f"--gguf-type {gguf_type}", "no GGUF file is asked for", fix="add --gguf")
    if shard is not None and not re.fullmatch(r"[1-9]\d*[KMGT]B", shard):
        raise UserError(f"--max-shard-size {shard}", "no size", expected="such as 2GB or 500MB")


def _check(baton: Baton, target: Path, *, full: bool, lora: bool, dtype: Dtype | None, shard: str | None) -> None:
    if os.path.lexists(target):
        raise UserError(f"--to {target}", "it is there already", expected="a new folder")
    if lora and full:
        found = "a full model is asked for too" if baton.is_adapter else "its stage published a full model"
        raise UserError("--lora", found, expected="an adapter, without --merge and --gguf")
    if not full and (dtype or shard):
        option = f"--dtype {dtype}" if dtype else f"--max-shard-size {shard}"
        raise UserError(option, "an adapter is exported as it was trained", fix="add --merge for a full model")
    if full:
        model.check_merges(baton)


def _check_push(baton: Baton, repo: str, *, full: bool) -> None:
    if not full and hub_id(baton.base) is None:
        raise UserError(
            f"--push-to-hub {repo}",
            f"the adapter's base is a folder of this machine, {baton.base}, which nobody else can open",
            expected="an adapter on a base from the hub, or a full model",
            fix="add --merge",
        )
    hub.check(repo)
