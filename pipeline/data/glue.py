"""Rows of GLUE and SuperGLUE to texts and labels, from the hub or from the official files. Torch-free."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.glue import HUB, TASKS, Part, Task
from pipeline.config.recipe import Recipe
from pipeline.config.schema import Classify
from pipeline.data.formats import file_rows
from pipeline.data.read import Bad, Row, file_hash
from pipeline.errors import UserError

PLACEHOLDER = "@placeholder"
CONVERTED = "refs/convert/parquet"
"""Where the hub keeps its own conversion of a dataset that is a loading script, which `datasets` no longer runs."""


@dataclass(frozen=True)
class Item:
    """What is classified: `pieces` of text in order, and the label (a class, or a number for regression).

    `group` names the question of a task that is scored by question. For ReCoRD, `candidate` is the entity in the query's
    place and `answers` are the entities that are right there.
    """

    pieces: tuple[str, ...]
    label: float
    group: tuple[int, ...] = ()
    candidate: str = ""
    answers: tuple[str, ...] = ()


@dataclass
class Data:
    """A task's rows: `train`, and each validation split by name. `counts`: source -> what -> rows."""

    train: list[Item] = field(default_factory=list)
    validation: dict[str, list[Item]] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a split is read: `file`, or the hub when that is None; `name` is what the manifest calls it."""

    part: Part
    name: str
    file: Path | None


def load(recipe: Recipe, stage: str) -> Data:
    """All rows of a classify stage's task. Raises UserError naming the file and the row of what cannot be read."""
    task, data = TASKS[_block(recipe, stage).task], Data()
    where = recipe.where("stages", stage, "data")
    for place in places(recipe, stage):
        counts = data.counts.setdefault(place.name, Counter())
        rows = _official(place.file, task, counts) if place.file else _hub(task, place.part, where)
        found = list(items(task, rows))
        counts["rows"] += len(found)
        if not found:
            raise UserError(where, f"{place.name} holds no row", expected="at least one row")
        if place.part is task.train:
            data.train = found
        else:
            data.validation[place.part.name] = found
    return data


def places(recipe: Recipe, stage: str) -> list[Place]:
    """Where each split of a classify stage's task is. Raises UserError for a file that is not there.

    `data` may be the task's own folder or the one that holds all tasks' folders.
    """
    block = _block(recipe, stage)
    task = TASKS[block.task]
    if block.data is None:
        return [Place(part, f"{HUB[task.suite]}/{part.config}/{part.split}", None) for part in task.parts]
    folder, found = Path(recipe.data(block.data)), []
    for part in task.parts:
        own = Path(part.file).name
        name = next((name for name in (part.file, own) if (folder / name).is_file()), None)
        if name is None:
            raise UserError(
                recipe.where("stages", stage, "data"),
                f"no {own} of {block.task} in {folder}" if folder.is_dir() else f"no folder {folder}",
                expected="the official download: " + ", ".join(part.file for part in task.parts),
                fix="give the folder that holds these files, or leave `data` out to read the hub's",
            )
        found.append(Place(part, f"{block.data.rstrip('/')}/{name}", folder / name))
    return found


def fingerprints(recipe: Recipe, stage: str) -> list[dict[str, Any]]:
    """Name and content hash of every split's file; of the name itself for the hub's."""
    return [
        {
            "path": place.name,
            "sha256": file_hash(place.file) if place.file else hashlib.sha256(place.name.encode()).hexdigest(),
        }
        for place in places(recipe, stage)
    ]


def _block(recipe: Recipe, stage: str) -> Classify:
    block = recipe.stages[stage]
    assert isinstance(block, Classify)
    return block


def _hub(task: Task, part: Part, where: str) -> Iterator[Row]:
    from datasets import load_dataset

    hub = HUB[task.suite]
    try:
        try:
            dataset = load_dataset(hub, part.config, split=part.split)  # nosec B615 # rows, which the manifest hashes
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            dataset = load_dataset(hub, part.config, split=part.split, revision=CONVERTED)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            where,
            f"the hub did not give {hub}, {part.config}, {part.split}: {reason}",
            fix="check the network, or write `data:` with the folder of the official download",
        ) from None
    for number, fields in enumerate(dataset, 1):
        yield Row(_renamed(task, fields), hub, number)


def _official(file: Path, task: Task, counts: Counter[str]) -> Iterator[Row]:
    """Rows of an official file as the hub has them: MultiRC's answers and ReCoRD's queries one by one."""
    rows = _tsv_rows(file, task, counts) if file.suffix == ".tsv" else _json_rows(file)
    for row in rows:
        try:
            for fields in _FLATTEN.get(task.layout, _as_it_is)(row.fields):
                yield Row(_renamed(task, fields), row.file, row.number)
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"data {row.where}", f"not as the official file has it: {error!r}", fix="re-download the file"
            ) from None


def _json_rows(file: Path) -> Iterator[Row]:
    for row in file_rows(file):
        if isinstance(row, Bad):
            raise UserError(f"data {row.where}", f"{row.reason}: {row.detail}", fix="mend or re-download the file")
        yield row


def _tsv_rows(file: Path, task: Task, counts: Counter[str]) -> Iterator[Row]:
    """Lines cut at tabs. Not the csv module: these files have no quoting, and texts with quotation marks in them."""
    name = str(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data {name}", f"cannot be read: {error}", fix="replace or re-download the file") from None
    lines = text.split("\n")
    header = list(task.header) or lines.pop(0).rstrip("\r").split("\t")
    first = 1 if task.header else 2
    for number, line in enumerate(lines, first):
        cells = line.rstrip("\r").split("\t")
        if cells == [""]:
            continue
        if len(cells) == len(header):
            yield Row(dict(zip(header, cells, strict=True)), name, number)
        elif task.ragged:
            counts["broken lines"] += 1
        else:
            raise UserError(
                f"data {name}, row {number}",
                f"{len(cells)} cells",
                expected=f"{len(header)}: {', '.join(header)}",
                fix="mend or re-download the file; cells are set apart by tabs and never quoted",
            )


def _renamed(task: Task, fields: dict[str, Any]) -> dict[str, Any]:
    return {task.local.get(name, name): value for name, value in fields.items()}


def _as_it_is(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [fields]


def _answers(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line of MultiRC: one row for each answer of each question."""
    for question in fields["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": fields["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
                "idx": {"paragraph": fields["idx"], "question": question["idx"], "answer": answer["idx"]},
            }


def _queries(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line of ReCoRD: one row for each query, with the passage's distinct entities and the query's distinct answers."""
    text = fields["passage"]["text"]
    entities = sorted({text[entity["start"] : entity["end"] + 1] for entity in fields["passage"]["entities"]})
    for query in fields["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": entities,
            "answers": sorted({answer["text"] for answer in query["answers"]}),
            "idx": {"passage": fields["idx"], "query": query["idx"]},
        }


_FLATTEN: dict[str, Any] = {
    "multirc": _answers,
    "record": _queries,
    "wsc": lambda fields: [{**fields, **fields["target"]}],
}


def items(task: Task, rows: Iterator[Row]) -> Iterator[Item]:
    """Rows as the hub has them, as texts and labels."""
    for row in rows:
        try:
            yield from _items(task, row)
        except KeyError as error:
            raise UserError(
                f"data {row.where}",
                f"no column {error.args[0]}; found: {', '.join(row.fields)}",
                expected=", ".join([*task.texts, "label"]),
                fix="check that the file is this task's",
            ) from None
        except IndexError:
            raise UserError(
                f"data {row.where}", "a span begins after the text's last word", fix="mend or re-download the file"
            ) from None


def _items(task: Task, row: Row) -> Iterator[Item]:
    fields = row.fields
    if task.layout == "record":
        query = (fields["idx"]["passage"], fields["idx"]["query"])
        answers = tuple(fields["answers"])
        for entity in fields["entities"]:
            filled = {**fields, "query": fields["query"].replace(PLACEHOLDER, entity)}
            yield Item(_pieces(task, filled), float(entity in answers), query, entity, answers)
        return
    if task.layout == "wsc":
        fields = {**fields, "text": _marked(fields)}
    group = (fields["idx"]["paragraph"], fields["idx"]["question"]) if task.layout == "multirc" else ()
    yield Item(_pieces(task, fields), _label(task, fields["label"], row), group)


def _label(task: Task, value: Any, row: Row) -> float:
    """The class's number or, for regression, the value. Files write classes as names, digits or truth values."""
    if not task.labels:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"data {row.where}", f"label {value!r}", expected="a number") from None
    if isinstance(value, str) and value in task.labels:
        return float(task.labels.index(value))
    digits = int(value) if not isinstance(value, str) or value.isdigit() else -1
    if not 0 <= digits < len(task.labels):
        raise UserError(
            f"data {row.where}",
            f"label {value!r}",
            expected=f"one of: {', '.join(task.labels)}, or its number",
            fix="use a split whose labels are public",
        )
    return float(digits)


def _pieces(task: Task, fields: dict[str, Any]) -> tuple[str, ...]:
    """The texts in order: one alone as it is; of several each on a line of its own, after its name."""
    if len(task.texts) == 1:
        return (fields[task.texts[0]],)
    return tuple(_piece(name, fields[name], number > 0) for number, name in enumerate(task.texts))


@lru_cache(maxsize=64)
def _piece(name: str, text: str, below: bool) -> str:
    """Kept, so that all candidates of one passage share one string."""
    start = "\n" if below else ""
    return f"{start}{name.removesuffix('_text')}: {text}"


def _marked(fields: dict[str, Any]) -> str:
    """WSC's text with `*` around the first span and `#` around the second. A span is told by its first word's number."""
    words = fields["text"].split()
    for number, mark in ((1, "*"), (2, "#")):
        first = fields[f"span{number}_index"]
        last = min(first + len(fields[f"span{number}_text"].split()), len(words)) - 1
        words[first] = f"{mark} {words[first]}"
        words[last] = f"{words[last]} {mark}"
    return " ".join(words)
