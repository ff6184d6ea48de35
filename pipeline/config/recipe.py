"""Read a recipe, resolve what its stages inherit, and refuse what cannot work: in milliseconds and without torch."""

from __future__ import annotations

import copy
import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import plain_yaml
from pipeline.config.block import closest
from pipeline.config.distill import Distill, check_distill
from pipeline.config.export import Export
from pipeline.config.fitting import check_attention, check_export, check_method
from pipeline.config.kinds import DATA, KINDS
from pipeline.config.measured import check_held_out, check_measured
from pipeline.config.merge import Merge, Part, check_merge
from pipeline.config.methods import METHODS
from pipeline.config.mixture import check_mixture
from pipeline.config.ppo import check_ppo
from pipeline.config.preference import check_preference
from pipeline.config.schema import (
    REWARD_KEYS,
    Classify,
    Frozen,
    FunctionReward,
    Header,
    Ppo,
    Source,
    Stage,
    Supervised,
)
from pipeline.config.selection import Selection, check_selection
from pipeline.config.tokens import check_tokens
from pipeline.data.read import inside
from pipeline.errors import UserError

SHIPPED = Path(__file__).resolve().parent.parent / "recipes"
DS_CONFIGS = SHIPPED.parent.parent / "ds_configs"
INHERITED = ("base", "adapter", "deepspeed")
BASE = "base"
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"

OUTSIDE = ("tensorboard", "csv_monitor", "wandb", "comet", "nebula", "autotuning", "flops_profiler.output_file")
"""Keys of a DeepSpeed configuration that make DeepSpeed write elsewhere than into the run directory."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `stages` is in the order they are written; every block is complete (inheritance resolved)."""

    path: Path
    header: Header
    stages: dict[str, Stage]

    @property
    def name(self) -> str:
        return self.header.name

    def where(self, *keys: str) -> str:
        return f"recipe {self.path.name}: {'.'.join(keys)}"

    def parents(self, stage: str) -> list[str]:
        """The upstream stages that `stage` reads, each once, in the order of its keys."""
        block = self.stages[stage]
        names = [name for _, name in upstream(block)]
        return list(dict.fromkeys(name for name in names if name != BASE))

    def order(self) -> list[str]:
        """All stages, upstream before downstream."""
        done: dict[str, None] = {}

        def visit(stage: str, trail: tuple[str, ...]) -> None:
            if stage in trail:
                cycle = " -> ".join([*trail[trail.index(stage) :], stage])
                raise UserError(
                    self.where("stages", stage),
                    f"the stages wait for each other: {cycle}",
                    fix="let one of them start from `base`",
                )
            for parent in self.parents(stage):
                visit(parent, (*trail, stage))
            done.setdefault(stage)

        for stage in self.stages:
            visit(stage, ())
        return list(done)

    def local(self, path: str) -> str:
        """`path` as the recipe means it: relative to the recipe file when such a file or folder is there, else unchanged."""
        expanded = os.path.expanduser(os.path.expandvars(path))
        if unset := re.search(r"\$\{?(\w+)", expanded):
            raise UserError(
                self.where(path), f"the environment variable {unset[1]} is not set", fix=f"export {unset[1]}=FOLDER"
            )
        beside = self.path.parent / expanded
        if os.path.isabs(expanded) or not (beside.exists() or glob.glob(str(beside), recursive=True)):
            return expanded
        return str(beside.resolve())

    def data(self, path: str) -> str:
        """`path` of data, as `local`. Raises UserError when it leads out of `data.root`, where the recipe has one."""
        found, root = self.local(path), self.header.data.root
        if root is not None:
            inside(found, Path(self.local(root)), self.where("data", "root"))
        return found

    def interval(self, stage: str, source: Source) -> tuple[float, float]:
        """The part of [0, 1) of hashed prompts that `source` gives to `stage`, after the held-out part is taken. A selection
        that includes another one looks at the same rows as that."""
        block = self.stages[stage]
        if isinstance(block, Selection) and block.include is not None:
            same = self.stages[block.include]
            return self.interval(block.include, sources(same)[sources(block).index(source)])
        if stage in self.header.data.split:
            return self._part(stage)
        if source.share is None:
            return 0.0, 1.0
        start = 0.0
        for name, block in self.stages.items():
            for other in shared(block):
                if other.name != source.name or other.share is None:
                    continue
                if name == stage and other is source:
                    return start, min(1.0, start + other.share)
                start += other.share
        raise AssertionError(f"{stage} does not list {source.name}")

    def _part(self, stage: str) -> tuple[float, float]:
        """The part that `data.split` gives to `stage`: parts lie one after the other in the order they are written."""
        parts = self.header.data.split
        names, total = list(parts), sum(parts.values())
        before = sum(parts[name] for name in names[: names.index(stage)])
        return before / total, 1.0 if stage == names[-1] else (before + parts[stage]) / total


def sources(block: Stage, key: str | None = None) -> list[Source]:
    """The data that a block lists: all of it, or what is under `key` (dotted)."""
    found: list[Source] = []
    for name in KINDS[block.kind].sources if key is None else (key,):
        found += _value(block, name) or []
    return found


def shared(block: Stage) -> list[Source]:
    """The data of which a block takes a share of its own."""
    return [] if isinstance(block, Selection) and block.include is not None else sources(block)


def _value(block: Stage, key: str) -> Any:
    """What stands under a dotted key; None where there is nothing."""
    value: Any = block
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def functions(block: Stage) -> list[str]:
    """The Python functions, `package.module:function`, that a block names."""
    rewards = [*(block.reward or []), *(block.gold or [])] if isinstance(block, Ppo) else []
    named = [source.function for source in rewards if isinstance(source, FunctionReward)]
    judge = getattr(block, "judge", None)
    return [*named, *([judge] if judge else [])]


def upstream(block: Stage) -> Iterator[tuple[str, str]]:
    """(key, stage name) for every upstream stage a block names; the name may be `base`."""
    kind = KINDS[block.kind]
    for key in kind.inputs:
        value = _value(block, key)
        for item in value if isinstance(value, list) else [value]:
            name = item if isinstance(item, str) else getattr(item, "stage", None)
            if getattr(item, "run", None) is not None:
                continue
            for stage in name if isinstance(name, list) else [name] if name is not None else []:
                yield key, stage
    for key in kind.sources:
        for source in sources(block, key):
            if source.stage is not None:
                yield key, source.stage


def elsewhere(block: Stage) -> list[Part]:
    """The stages of other runs that a block names."""
    return [part for part in block.of if part.run is not None] if isinstance(block, Merge) else []


def outside(block: Stage) -> Iterator[tuple[str, Any]]:
    """(key, what names it) for every model that a block names by `model` and no stage made."""
    for key in KINDS[block.kind].inputs:
        place = key.removesuffix(".stage")
        value = _value(block, place)
        listed = isinstance(value, list)
        for number, item in enumerate(value if listed else [value]):
            if getattr(item, "stage", "") is None and item.model is not None:
                yield f"{place}.{number}" if listed else place, item


def trusted(block: Stage) -> list[str]:
    """The models of a block whose own Python code runs (`trust_remote_code`), as the recipe names them."""

    def found(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if value.get("trust_remote_code") and value.get("model"):
                yield str(value["model"])
            value = list(value.values())
        for inner in value if isinstance(value, list) else []:
            yield from found(inner)

    return list(dict.fromkeys(found(resolved(block))))


def resolved(block: Stage) -> dict[str, Any]:
    """The block as plain data: what the manifest records and what decides whether a stage must run again. The number of ranks
    counts, not the hosts that they lie on."""
    value = block.model_dump(mode="json", exclude={"deepspeed": {"timeout"}})
    value["deepspeed"] |= {"num_gpus": block.deepspeed.ranks, "num_nodes": 1, "hostfile": None}
    return value


def digest(value: Any) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find(name: str) -> Path:
    """A recipe file by path, or a shipped recipe by name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path.resolve()
        raise UserError(f"recipe {name}", "no such file", fix="check the path, or name a shipped recipe: " + shipped())
    candidate = SHIPPED / f"{name}.yaml"
    if candidate.is_file():
        return candidate
    raise UserError(
        f"recipe {name}", "no such file and no shipped recipe of that name", expected=f"one of: {shipped()}"
    )


def shipped() -> str:
    return ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))


def load(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override (`stages.ppo.kl.target=6`), resolve and check a recipe.

    Raises UserError for anything a user can get wrong: unknown keys, wrong types, missing upstream stages, shares above
    one, batches that do not divide.
    """
    path = find(str(name))
    raw = written(path, overrides)
    stages_raw = raw.pop("stages", None)
    if not isinstance(stages_raw, dict) or not stages_raw:
        raise UserError(
            f"recipe {path.name}: stages",
            "no stages",
            expected="a mapping of stage name to block",
            fix="add at least one stage, such as `sft: {kind: sft, data: [...], lr: 1.0e-4}`",
        )
    header = _validate(Header, raw, f"recipe {path.name}", "")
    recipe = Recipe(path, header, {})
    for stage, block in stages_raw.items():
        recipe.stages[str(stage)] = _stage(recipe, raw, str(stage), block)
    _check(recipe)
    return recipe


def written(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe as it is written, with `overrides` laid over it, not checked further."""
    raw = parse(path)
    method_first = sorted(overrides or [], key=lambda text: not text.partition("=")[0].endswith("adapter.method"))
    for override in method_first:
        _override(raw, override)
    return raw


def parse(path: Path) -> dict[str, Any]:
    """A recipe as it is written: a mapping, not checked further."""
    try:
        raw = plain_yaml.read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {path.name}", f"not valid YAML: {reason}", fix="mend that line") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"recipe {path.name}", f"found {type(raw).__name__}", expected="a mapping with name, base, stages"
        )
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}", "no `=`", expected="KEY=VALUE, such as stages.ppo.kl.target=6")
    node: Any = raw
    *path, last = key.split(".")
    for part in path:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part] if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UserError(f"--set {key}", f"{part} is not a block", expected="the dotted path of a key in the recipe")
    try:
        if path[-1:] == ["adapter"] and last == "method":
            kept = _switched(node, plain_yaml.read(value))
            node.clear()
            node.update(kept)
        node[last] = plain_yaml.read(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {key}",
            f"{value!r} is not valid YAML: {' '.join(str(error).split())}",
            expected="a value as it would stand in the recipe",
        ) from None


def _switched(adapter: dict[str, Any], method: Any) -> dict[str, Any]:
    """An adapter block's keys once its method is `method`: those of another kind of adapter mean nothing to it."""
    old = adapter.get("method", "lora")
    known = all(isinstance(name, str) and name in METHODS for name in (old, method))
    if old == method or not known:
        return dict(adapter) if old == method else {"method": method}
    alike = METHODS[old].peft and METHODS[old].peft == METHODS[method].peft
    kept = {key: value for key, value in adapter.items() if alike and key in METHODS[method].options}
    return {**kept, "method": method}


def _stage(recipe: Recipe, raw: dict[str, Any], stage: str, block: Any) -> Stage:
    where = recipe.where("stages", stage)
    if stage == BASE or not re.fullmatch(NAME, stage):  # it becomes a folder of the run directory
        raise UserError(
            where,
            f"{stage!r} cannot be the name of a stage",
            expected="letters, digits, `.`, `_` and `-`, a letter, digit or `_` first, and not `base`",
            fix="choose another name",
        )
    if not isinstance(block, dict):
        raise UserError(where, f"found {type(block).__name__}", expected="a block with `kind:`")
    kind = block.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{where}.kind",
            f"found {kind!r}",
            expected="one of: " + ", ".join(KINDS),
            fix=closest(str(kind), KINDS) or f"write `kind: {next(iter(KINDS))}`",
        )
    merged = copy.deepcopy(block)
    schema = KINDS[kind].schema
    for key in INHERITED if KINDS[kind].model else ("deepspeed",):
        own = merged.get(key) or {}
        if not isinstance(own, dict):
            raise UserError(
                f"{where}.{key}", f"found {own!r}", expected=f"a block, as `{key}:` at the top of the recipe"
            )
        merged[key] = {**(raw.get(key) or {}), **own}
    if KINDS[kind].model:
        if own := (block.get("adapter") or {}).get("method"):
            merged["adapter"] = {**_switched(raw.get("adapter") or {}, own), **block["adapter"]}
        if merged["adapter"].get("method") == "qlora" and merged["base"].get("quantization") is None:
            merged["base"]["quantization"] = "nf4"
    merged.setdefault("seed", recipe.header.seed)
    if "holdout" in block:  # one held-out part for all stages, else one would train on what another holds out
        raise UserError(
            f"{where}.holdout",
            "a stage cannot hold out prompts of its own",
            expected="`data.holdout`",
            fix="remove it here and set `data: {holdout: …}` at the top of the recipe",
        )
    merged["holdout"] = recipe.header.data.holdout
    return _validate(schema, merged, where, ".")


def _validate(schema: type[Any], value: Any, where: str, joint: str) -> Any:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        # A misspelt required key is also a missing one; the misspelling is what helps.
        first = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
        # A reward source is told by its one key, which pydantic puts into the path after the source's number.
        loc = first["loc"]
        keys = [str(k) for n, k in enumerate(loc) if not (n and isinstance(loc[n - 1], int) and k in REWARD_KEYS)]
        place = f"{where}{joint or ': '}{'.'.join(keys)}" if keys else where
        if first["type"] == "extra_forbidden":
            known = _fields(schema, keys[:-1])
            raise UserError(
                place,
                "unknown key",
                expected="one of: " + ", ".join(known),
                fix=closest(keys[-1], known) or "remove it",
            ) from None
        if first["type"] == "secret":  # what was found is not shown
            raise UserError(
                place,
                first["msg"],
                expected="an address without a secret: recipes stand in manifests and in lists of processes",
                fix="write `key_env: NAME`, the environment variable that holds the token",
            ) from None
        if first["type"] == "missing":
            raise UserError(place, "missing", expected=f"a value for `{keys[-1]}`", fix=f"add `{keys[-1]}:`") from None
        if first["type"] == "misplaced":
            key, known = first["ctx"]["key"], first["ctx"]["known"]
            raise UserError(
                f"{place}.{key}",
                first["ctx"]["found"],
                expected="one of: " + ", ".join(known) if known else "",
                fix=closest(re.findall(r"\w+", first["ctx"]["found"])[-1], known) or ("" if known else "remove it"),
            ) from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        found = first["input"] if keys else "this block"
        raise UserError(place, f"found {found!r}" if keys else message, expected=message if keys else "") from None


def _fields(schema: type[Any], keys: list[str]) -> list[str]:
    """Field names of the block at `keys` below `schema`."""
    for key in keys:
        field = schema.model_fields.get(key)
        annotation = getattr(field, "annotation", None)
        inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        if inner:
            schema = inner[0]
    return list(schema.model_fields)


def _check(recipe: Recipe) -> None:
    for stage, block in recipe.stages.items():
        _check_upstream(recipe, stage, block)
        _check_batches(recipe, stage, block)
        check_mixture(recipe, stage)
        check_tokens(recipe, stage)
        check_measured(recipe, stage)
        check_held_out(recipe, stage)
        if isinstance(block, Ppo):
            check_ppo(recipe, stage, block)
        if isinstance(block, Distill):
            check_distill(recipe, stage, block)
        if getattr(block, "eval_every", None) and block.holdout == 0 and not isinstance(block, Classify):
            raise UserError(
                recipe.where("stages", stage, "eval_every"),
                "there is nothing to evaluate on: data.holdout is 0",
                fix="set `data: {holdout: 0.02}`, or leave out eval_every",
            )
        deepspeed = deepspeed_config(recipe, stage)
        if not KINDS[block.kind].model:
            continue
        check_attention(recipe, stage)
        if not isinstance(block, Frozen):
            check_method(recipe, stage, deepspeed)
    _check_split(recipe)
    totals: dict[str, float] = {}
    for stage, block in recipe.stages.items():
        for source in shared(block):
            totals[source.name] = totals.get(source.name, 0.0) + (source.share or 0.0)
            if totals[source.name] > 1.0 + 1e-9:
                raise UserError(
                    recipe.where("stages", stage),
                    f"the shares of {source.name} add up to {totals[source.name]:g}",
                    expected="at most 1 over all stages",
                    fix="lower a share",
                )
    recipe.order()
    for stage, block in recipe.stages.items():
        if isinstance(block, Selection):
            check_selection(recipe, stage, block)
        if isinstance(block, Merge):
            check_merge(recipe, stage, block)
        if isinstance(block, Export):
            check_export(recipe, stage, block)


def _check_split(recipe: Recipe) -> None:
    for stage in recipe.header.data.split:
        where = recipe.where("data", "split", stage)
        if stage not in recipe.stages:
            raise UserError(
                where,
                f'no stage named "{stage}"',
                expected="one of: " + ", ".join(recipe.stages),
                fix=closest(stage, recipe.stages) or f'remove it, or add a stage called "{stage}"',
            )
        if any(source.share is not None for source in shared(recipe.stages[stage])):
            raise UserError(
                where,
                f"stage {stage} has a `share` of its own in a source",
                expected="one of the two",
                fix="remove the share: `data.split` cuts every source alike",
            )


def _check_upstream(recipe: Recipe, stage: str, block: Stage) -> None:
    kind = KINDS[block.kind]
    for key, name in upstream(block):
        if name == BASE and key in kind.base_ok:
            continue
        accepted = kind.inputs.get(key, DATA)
        fitting = [s for s, b in recipe.stages.items() if b.kind in accepted and s != stage]
        expected = (
            "one of: " + ", ".join(fitting + ([BASE] if key in kind.base_ok else []))
            if fitting
            else (f"an upstream stage of kind {' or '.join(sorted(accepted))}")
        )
        if name not in recipe.stages:
            match = difflib.get_close_matches(name, fitting, n=1) or fitting[:1]
            hint = f"write `{key}: {match[0]}`, or " if match else ""
            raise UserError(
                recipe.where("stages", stage, key),
                f'no stage named "{name}"',
                expected=expected,
                fix=f'{hint}add a stage called "{name}"',
            )
        if recipe.stages[name].kind not in accepted:
            raise UserError(
                recipe.where("stages", stage, key),
                f'stage "{name}" is of kind {recipe.stages[name].kind}',
                expected=expected,
            )


def deepspeed_config(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The DeepSpeed configuration that a stage names. Raises UserError when it is not there, not a JSON object,
    or asks for what Relay cannot run."""
    name, names = recipe.stages[stage].deepspeed.config, sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    where = recipe.where("stages", stage, "deepspeed", "config")
    path = DS_CONFIGS / f"{name}.json" if name in names else Path(recipe.local(name))
    if not path.is_file():
        raise UserError(
            where,
            f'no configuration "{name}"',
            expected="a JSON file or one of: " + ", ".join(names),
            fix=closest(name, names) or "give the path of a DeepSpeed JSON file",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(where, f"{path} is not valid JSON: {error}", fix="mend that line") from None
    if not isinstance(config, dict):
        raise UserError(where, f"{path} holds {type(config).__name__}", expected="a JSON object")
    for key in OUTSIDE:
        block, _, inner = key.partition(".")
        if isinstance(found := config.get(block), dict) and (found.get(inner) if inner else found.get("enabled")):
            raise UserError(
                where,
                f"{path} has `{key}`, with which DeepSpeed writes outside the run directory",
                fix="leave it out; `tracking:` in the recipe says where metrics go",
            )
    hybrid = config.get("hybrid_engine")
    if isinstance(hybrid, dict) and hybrid.get("enabled"):
        raise UserError(
            where,
            f"{path} enables hybrid_engine, whose kernels generate without PEFT's adapters and for one model per engine",
            fix="leave hybrid_engine out; `sampling.engine` says how replies are sampled",
        )
    trained, zero = recipe.stages[stage], config.get("zero_optimization", {})
    if isinstance(trained, Supervised | Ppo) and trained.base.dtype == "fp16" and not zero.get("stage"):
        raise UserError(
            where,
            "trains in fp16 without ZeRO, where DeepSpeed divides gradients by a loss scale that no loss was multiplied by",
            fix="use zero1, or `dtype: bf16` under `base`",
        )
    return config


def _check_batches(recipe: Recipe, stage: str, block: Stage) -> None:
    ranks = block.deepspeed.ranks
    if isinstance(block, Supervised):
        micro, _ = split(recipe.where("stages", stage, "batch"), block.batch, ranks, block.micro_batch)
        check_preference(recipe, stage, micro)
    if isinstance(block, Ppo):
        where = recipe.where("stages", stage, "rollout_batch")
        if block.rollout_batch % block.samples_per_prompt:
            raise UserError(
                where,
                f"{block.rollout_batch} responses are not {block.samples_per_prompt} for each prompt",
                fix=f"write a multiple of {block.samples_per_prompt}",
            )
        if block.rollout_batch % block.minibatches:
            raise UserError(
                where,
                f"{block.rollout_batch} responses do not divide into {block.minibatches} minibatches",
                fix=f"write a multiple of {block.minibatches}",
            )
        split(where, block.rollout_batch // block.minibatches, ranks, None)


def split(where: str, batch: int, ranks: int, micro: int | None) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps) with micro x accumulation x ranks == batch.

    Without a wish the micro-batch is the largest divisor of the rank's share that is at most 16.
    """
    if batch % ranks:
        raise UserError(
            where, f"{batch} sequences do not divide over {ranks} ranks", fix=f"write a multiple of {ranks}"
        )
    share = batch // ranks
    size = micro or max(n for n in range(1, min(share, 16) + 1) if share % n == 0)
    if share % size:
        raise UserError(
            f"{where.rpartition('.')[0]}.micro_batch",
            f"{share} sequences per rank do not divide into micro-batches of {size}",
            fix=f"write `micro_batch: {max(n for n in range(1, min(share, size) + 1) if share % n == 0)}`",
        )
    return size, share // size
