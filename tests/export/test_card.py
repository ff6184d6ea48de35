"""The model card, read back by huggingface_hub and by YAML, and what a hostile run can write into it."""

from __future__ import annotations

import hashlib
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from pipeline import handoff
from pipeline.data.read import hub_fingerprint
from pipeline.export import card, lineage
from pipeline.export.command import export
from tests.support import hub, published

Export = Callable[..., Path]
EVIL = "x\n---\nlicense: mit\n---\n| <script>alert(1)</script> `a` | [b](http://c) \x1b[31m"


def front(text: str) -> dict[str, object]:
    """The front matter as the hub cuts it out: from the first line `---` to the next."""
    lines = text.split("\n")
    assert lines[0] == "---"
    return dict(yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])))


def tables(text: str) -> list[list[str]]:
    """The cells of every table row."""
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_what_the_hub_reads(exported: Export, run: Path) -> None:
    full = ModelCard.load(exported("ppo", merge=True, shard="300KB") / "README.md").data.to_dict()
    assert full == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["relay", "reward", "sft", "ppo", "lora"],
    }, "the base is a folder, which has no id, and says nothing of its licence"
    assert ModelCard.load(exported("ppo") / "README.md").data.library_name == "peft"
    assert ModelCard.load(exported("reward", merge=True) / "README.md").data.pipeline_tag == "text-classification"


def test_the_chain_with_hashes_and_parents(exported: Export, run: Path) -> None:
    text = (exported("ppo") / "README.md").read_text()
    hashes = {name: handoff.open_baton(run / name).content_hash[:16] for name in ("sft", "reward", "ppo")}
    rows = tables(text)
    made_from = f"`reward` `{hashes['reward']}`, `sft` `{hashes['sft']}`"
    assert ["`ppo`", "ppo", "lora", f"`{hashes['ppo']}`", made_from] in rows
    assert ["`sft`", "sft", "lora", f"`{hashes['sft']}`", ""] in rows
    assert all("whole" not in cell and "packed" not in cell for row in rows for cell in row), "not of the chain"
    assert str(published.tiny.ROOT) not in text, "where things lie on this machine is nobody's business"


def test_data_results_and_training(exported: Export) -> None:
    rows = tables((exported("ppo") / "README.md").read_text())
    file = hashlib.sha256(Path(published.PROMPTS).read_bytes()).hexdigest()
    data = hashlib.sha256(file.encode()).hexdigest()[:16]
    assert ["`ppo`", "`prompts.jsonl`", "2 held out, 90 rows, 88 used", f"`{data}`"] in rows
    assert ["loss", "1.25"] in rows
    assert ["score/reward, win rate (95 %)", "0.750 (0.625 to 0.875)"] in rows
    assert ["score/reward, before -> after", "0.5 -> 1.5"] in rows
    trained = next(row for row in rows if row[0] == "`ppo`" and "ZeRO-2" in row)
    assert trained[1:] == [
        "lora, alpha 8, dropout 0, r 4, targets all-linear",
        "steps 4, epochs 1, rollout\\_batch 8, lr 0.01",
        "fp32",
        "ZeRO-2",
        "1",
        "0",
    ]
    assert ["the base", "unknown"] in rows
    assert ["`prompts.jsonl`", "unknown"] in rows


def test_an_evaluation_of_another_policy_is_left_out(tmp_path: Path) -> None:
    """As when the stage was made anew since it was evaluated."""
    recipe = published.recipe(tmp_path)
    run = published.run(recipe, tmp_path / "run", ("sft", "reward", "ppo", "evaluate"))
    assert [m["stage"] for m, _ in lineage.evaluations(run, handoff.open_baton(run / "ppo"))] == ["evaluate"]
    published.publish(published.recipe(tmp_path, seed=7), run, "sft")
    again = published.publish(published.recipe(tmp_path, seed=7), run, "ppo")
    assert list(lineage.evaluations(run, again)) == [], "the bytes changed: it was made from another sft"


def test_licences_of_a_base_that_tells(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in (published.tiny.QUICKSTART / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    run = published.run(published.recipe(tmp_path, base__model=str(base)), tmp_path / "run", ("sft",))
    export(str(run), "sft", to=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert front(text)["license"] == "apache-2.0"
    assert ["the base", "apache-2.0"] in tables(text)
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert lineage.Licences().of_model(str(base)) == "unknown"


def test_a_base_and_data_from_the_hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in the front matter, with the licences that their cards tell; a folder that looks like an id is none."""
    said = {"org/base": "---\nlicense: llama3\n---\n", "org/rows": "---\nlicense: [mit, cc0-1.0]\n---\n"}
    baton = handoff.open_baton(run / "sft")
    sources = [
        {"path": "org/rows", "sha256": hub_fingerprint("org/rows"), "rows": 9},
        {"path": "org/silent", "sha256": hub_fingerprint("org/silent", "v1", "test"), "rows": 9},
        {"path": "mine/rows", "sha256": "0" * 64, "rows": 9},
    ]
    block = baton.manifest["inputs"]["block"]
    block = {**block, "data": [{"path": "org/silent", "revision": "v1", "split": "test", "subset": None}]}
    base = {"model": "org/base", "revision": None, "content_hash": "b" * 64, "quantization": None}
    manifest = {**baton.manifest, "inputs": {"block": block}, "data": sources, "base": base}
    (tmp_path / "out").mkdir()
    with hub.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        server.repos |= {n: {"private": False, "files": {"README.md": text.encode()}} for n, text in said.items()}
        card.write(run, handoff.Baton(baton.path, manifest), tmp_path / "out", form="adapter")
    text = (tmp_path / "out" / "README.md").read_text()
    found = front(text)
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", "adapter")
    assert found["datasets"] == ["org/rows", "org/silent"]
    assert found["license"] == "llama3"
    rows = tables(text)
    assert ["`org/rows`", "mit, cc0-1.0"] in rows
    assert ["`org/silent`", "unknown"] in rows
    assert ["`mine/rows`", "unknown"] in rows
    assert sorted(server.asked) == ["org/base", "org/rows", "org/silent"]


def test_a_hub_that_is_not_there_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        began, cards = time.monotonic(), lineage.Licences()
        assert [cards.of_model("org/base"), *(cards.of_data(f"org/{n}") for n in range(50))] == ["unknown"] * 51
    assert time.monotonic() - began < 10


def test_what_a_run_says_is_data(run: Path, tmp_path: Path) -> None:
    """Names, paths and metrics of a run cannot end the front matter, a table's cell or a code span."""
    baton = handoff.open_baton(run / "sft")
    manifest = baton.manifest | {
        "recipe": EVIL,
        "adapter": EVIL,
        "metrics": {EVIL: 1.0},
        "data": [{"path": EVIL, "sha256": "s", EVIL: 3}],
        "parents": {EVIL: EVIL},
    }
    folder = tmp_path / "out"
    folder.mkdir()
    card.write(run, handoff.Baton(baton.path, manifest), folder, form="full")
    text = (folder / "README.md").read_text()
    found = front(text)
    assert "license" not in found
    assert found["tags"] == ["relay", "sft", EVIL]
    assert text.count("\n---\n") == 1
    assert "\x1b" not in text.replace(repr(EVIL), "")
    body = text[text.index("\n---\n") + 5 :]
    spans = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script", spans)
    assert not re.search(r"(?<!\\)\[b\]", spans)
    widths = {"stage": 5, "at the end of the stage": 2, "of": 2}
    heads = [row for row in tables(body) if row[0] in widths]
    assert len(heads) >= 4
    for block in re.findall(r"(?:^\|.*\n?)+", body, flags=re.MULTILINE):
        assert len({len(row) for row in tables(block)}) == 1, block


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/name", "org/name"), ("gpt2", "gpt2"), ("/models/x", None), ("runs/a/sft/output", None), ("../x/y", None)],
)
def test_what_is_written_like_an_id_on_the_hub(name: str, expected: str | None) -> None:
    assert lineage.hub_id(name) == expected
