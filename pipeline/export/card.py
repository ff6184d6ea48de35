"""The model card of an export: where the model comes from, what was measured, how to load it. What a run says is data here:
it cannot end the front matter, a table or a code span."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from pipeline.export import lineage, model
from pipeline.export.lineage import UNKNOWN, Lineage
from pipeline.handoff import ADAPTER_CONFIG, Baton
from pipeline.published import CLASSIFIERS
from pipeline.summary import tested

LICENCE_ID = re.compile(r"[a-z0-9.+-]+")


def write(run: Path, baton: Baton, folder: Path, *, form: str) -> None:
    """Write README.md into the exported model's `folder`. `form` says what was exported: `adapter`, `lora` or `full`."""
    found = lineage.of(run, baton)
    licences = _licences(found)
    parts = [
        f"# {_text(baton.manifest['recipe'])}: {_text(baton.manifest['stage'])}\n\n{_opening(found, form)}",
        "## How to load it\n\n" + _loading(found, baton, folder, form),
        "## Where it comes from\n\n" + _chain(found),
        "## Data\n\n" + _data(found),
        "## Results\n\n" + _results(run, baton, found),
        "## How it was trained\n\n" + _training(found),
        "## Licences\n\n" + _licence_notes(licences),
        "## Made by\n\n" + _made_by(found),
    ]
    front = yaml.safe_dump(front_matter(found, licences, form), sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(found: Lineage, licences: dict[str, str], form: str) -> dict[str, Any]:
    """What the hub reads of a card. A licence is there when the base's is known and there is one id for it."""
    kinds = [stage["kind"] for stage in found.chain.values()]
    value: dict[str, Any] = {}
    if found.base_id is not None:
        value |= {
            "base_model": found.base_id,
            "base_model_relation": "finetune" if form == "full" else "adapter",
        }
    value["library_name"] = "transformers" if form == "full" else "peft"
    value["pipeline_tag"] = "text-classification" if _classifies(found) else "text-generation"
    value["tags"] = list(dict.fromkeys(["relay", *kinds, str(found.stage["adapter"])]))
    known = licences["the base"]
    if known != UNKNOWN and LICENCE_ID.fullmatch(known):
        value["license"] = known
    if hub := list(dict.fromkeys(source.path for source in found.data() if source.on_hub)):
        value["datasets"] = hub
    return value


def _classifies(found: Lineage) -> bool:
    return found.stage["kind"] in CLASSIFIERS


def _opening(found: Lineage, form: str) -> str:
    stage = found.stage
    what = {
        "full": "A full model",
        "adapter": f"An adapter ({_text(stage['adapter'])})",
        "lora": f"A LoRA that equals the stage's adapter ({_text(stage['adapter'])})",
    }[form]
    on = "" if form == "full" else f" on {_code(_name(stage['base']['model']))}"
    return f"{what}{on}, made by stage {_code(stage['stage'])} ({_text(stage['kind'])}) of a Relay run."


def _loading(found: Lineage, baton: Baton, folder: Path, form: str) -> str:
    auto = "AutoModelForSequenceClassification" if _classifies(found) else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    note = ""
    if form == "full":
        lines += ["model = " + auto + '.from_pretrained("this folder", dtype="auto")']
    else:
        labels = f", num_labels={len(model.labels(baton)) or 1}" if _classifies(found) else ""
        readme = baton.path / "README.md"
        more = readme.read_text(encoding="utf-8").partition("\n")[2].strip() if readme.is_file() else ""
        if "import pipeline.adapters" in more:
            lines.insert(0, "import pipeline.adapters  # of relay-rlhf: PEFT does not have this method")
        lines[-1:] = ["from peft import PeftModel", ""]
        lines += [
            f'base = {auto}.from_pretrained("the base"{labels})',
            'model = PeftModel.from_pretrained(base, "this folder")',
        ]
        record = baton.manifest["base"]
        note = (
            f"\n\nThe base is {_code(_name(record['model']))}"
            + (f", revision {_code(record['revision'])}" if record["revision"] else "")
            + f", weights {_code(record['content_hash'][:16])}"
            + (f", held in {record['quantization']} in training" if record["quantization"] else "")
            + f"; see `base_model_name_or_path` in `{ADAPTER_CONFIG}`."
        )
        note += f"\n\n{more}" if more and form == "adapter" else ""
    lines += ['tokenizer = AutoTokenizer.from_pretrained("this folder")']
    ggufs = "".join(f"\n\n`{file.name}` is the same model for llama.cpp." for file in sorted(folder.glob("*.gguf")))
    return "```python\n" + "\n".join(lines) + "\n```" + note + ggufs


def _chain(found: Lineage) -> str:
    base = found.base
    rows = [["the base", "", "", _code(base["content_hash"][:16]), _code(_name(base["model"]))]]
    for name, stage in found.chain.items():
        parents = ", ".join(f"{_code(parent)} {_code(told[:16])}" for parent, told in stage["parents"].items())
        rows.append(
            [
                _code(name),
                _text(stage["kind"]),
                _text(stage["adapter"] or ""),
                _code(stage["content_hash"][:16]),
                parents,
            ]
        )
    table = _table(["stage", "kind", "method", "content hash", "made from"], rows)
    lost = ", ".join(_code(name) for name in found.missing)
    return table + (f"\n\nNot told here, as it lies in another run or was made anew since: {lost}." if lost else "")


def _data(found: Lineage) -> str:
    rows = [
        [
            _code(source.stage),
            _code(source.path if source.on_hub else _name(source.path)),
            _text(", ".join(f"{value} {key}" for key, value in source.counts.items())),
            _code(source.sha256[:16]),
        ]
        for source in found.data()
    ]
    return _table(["stage", "source", "rows", "hash"], rows) if rows else "None."


def _results(run: Path, baton: Baton, found: Lineage) -> str:
    final = [[_text(name), f"{value:.4g}"] for name, value in found.stage["metrics"].items()]
    parts = [_table(["at the end of the stage", "value"], final)] if final else []
    for manifest, output in lineage.evaluations(run, baton):
        measured = [[_text(name), _text(value)] for name, value in tested(dict(manifest["metrics"]), output)]
        parts.append(_table([f"stage {_code(manifest['stage'])}", "value"], measured))
    return "\n\n".join(parts) or "Nothing was measured."


AMOUNTS = ("steps", "epochs", "batch", "rollout_batch", "lr")


def _training(found: Lineage) -> str:
    rows = []
    for name, stage in found.chain.items():
        if stage["base"] is None:
            continue
        block = stage["inputs"]["block"]
        base, options = block["base"], {key: value for key, value in block["adapter"].items() if key != "method"}
        rows.append(
            [
                _code(name),
                _text(", ".join([str(stage["adapter"]), *_told(options)])),
                _text(", ".join(_told({key: block.get(key) for key in AMOUNTS}))),
                base["dtype"] + (f" on {base['quantization']}" if base["quantization"] else ""),
                f"ZeRO-{stage['zero_stage']}",
                str(stage["world_size"]),
                str(stage["seed"]),
            ]
        )
    return _table(["stage", "adapter", "amount", "precision", "sharding", "ranks", "seed"], rows)


def _told(settings: dict[str, Any]) -> list[str]:
    """Each setting that is a number or a word, after its name."""
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in settings.items()}
    return [f"{key} {value}" for key, value in shown.items() if isinstance(value, int | str)]


def _licences(found: Lineage) -> dict[str, str]:
    """By what it is of: the base, then each source of data."""
    cards = lineage.Licences()
    told = {"the base": cards.of_model(found.base["model"], found.base["revision"])}
    for source in found.data():
        name = source.path if source.on_hub else _name(source.path)
        if not source.path.startswith("stage "):
            told[name] = cards.of_data(source.path) if source.on_hub else UNKNOWN
    return told


def _licence_notes(licences: dict[str, str]) -> str:
    rows = [[_text(name) if name == "the base" else _code(name), _text(value)] for name, value in licences.items()]
    return (
        _table(["of", "licence"], rows)
        + "\n\nThese are what the cards of base and data sets say; `unknown` is what says nothing, or could not be asked. A "
        "base's terms hold for what is made from it. What the data allows is for whoever shares this model to find out."
    )


def _made_by(found: Lineage) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in found.stage["versions"].items())
    return f"Relay {relay_version()}; the stage ran with {_text(libraries)}."


def relay_version() -> str:
    try:
        return version("relay-rlhf")
    except PackageNotFoundError:  # a checkout that is on the path and not installed
        return "(not installed)"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(path: str) -> str:
    """How a path of this machine is named to others."""
    return Path(path).name if Path(path).is_absolute() else path


def _one_line(value: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _text(value: Any) -> str:
    """Any value as plain text inside a line of Markdown."""
    return re.sub(r"([\\`*_\[\]<|&~$])", r"\\\1", _one_line(value))


def _code(value: Any) -> str:
    """Any value as a code span inside a table's cell."""
    return "`" + _one_line(value).replace("`", "'").replace("|", "¦") + "`"
