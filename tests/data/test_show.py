"""What `relay data show` prints, against rows whose lengths are counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import commands
from pipeline.errors import UserError

ROWS = [{"prompt": "p" * n, "completion": "c"} for n in range(1, 21)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(*arguments: Any) -> str:
    """What the command prints; its UserError is raised."""
    result = CliRunner().invoke(commands, ["data", "show", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are the bytes of UTF-8, with `</s>` to end and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bytes")
    vocabulary = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE)
    made.save_pretrained(folder)
    return folder


def cells(text: str, name: str) -> list[str]:
    """The cells of the table's row that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name}")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


@pytest.mark.fast
def test_counts_shapes_reasons_and_lengths(tmp_path: Path) -> None:
    strange = [{"prompt": "p", "completion": ""}, {"text": "t"}, {"turns": 1}, [1]]
    text = shown(write(tmp_path / "a.jsonl", [*ROWS, *strange]))
    assert "read for sft" in text
    assert cells(text, "rows") == ["24"]
    assert cells(text, "can be used") == ["21"]
    for words in (
        "prompt + completion: 21",
        "text: 1",
        "not recognised: 1",
        "empty reply: 1",
        "no shape is recognised: 1",
    ):
        assert words in text
    assert "a list, not a JSON object: 1" in text
    assert cells(text, "prompt, characters") == [
        "1",
        "10",
        "19",
        "20",
        "20",
    ]  # nearest rank of 20 lengths; text has none
    assert cells(text, "reply, characters") == ["1", "1", "1", "1", "1"]
    assert text.count("a.jsonl, row ") == 3
    assert "With --tokenizer MODEL" in text


@pytest.mark.fast
def test_kind_follows_the_rows_or_is_given(tmp_path: Path) -> None:
    pairs = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}] * 2)
    assert "read for reward" in shown(pairs)
    assert "rejected reply: bad" in shown(pairs)
    text = shown(pairs, "--kind", "ppo", "--rows", 1, "--limit", 1)
    assert "read for ppo" in text
    assert cells(text, "first rows") == ["1"]
    assert "good" not in text
    with pytest.raises(UserError, match="no such kind"):
        shown(pairs, "--kind", "dpo")


@pytest.mark.fast
def test_what_is_not_training_data_is_refused_with_its_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its columns are a, b"):
        shown(write(tmp_path / "a.jsonl", [{"a": 1}, {"b": 2}]))
    with pytest.raises(UserError, match="no such file"):
        shown(tmp_path / "none.jsonl")


@pytest.mark.fast
def test_a_row_commands_neither_the_terminal_nor_the_markup(tmp_path: Path) -> None:
    text = shown(write(tmp_path / "a.jsonl", [{"prompt": "\x1b[2J[bold]p[/bold]", "completion": "a\tb\x9b"}]))
    assert "prompt: \\x1b[2J[bold]p[/bold]" in text
    assert "\\x9b" in text
    assert "\x1b" not in text


def test_trained_tokens_are_marked(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Say ü.", "completion": "üb"}])
    text = shown(path, "--tokenizer", byte_tokenizer)
    # 7 bytes of prompt, 3 of reply, and EOS.
    assert "prompt and reply, 11 tokens; [[trained on]]: Say ü.[[üb</s>]]" in text
    assert cells(text, "prompt and reply, tokens") == ["11"] * 5
    assert cells(text, "reply, characters") == ["2"] * 5


def test_the_token_that_is_scored_is_marked(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": " good", "rejected": " bad"}])
    text = shown(path, "--tokenizer", byte_tokenizer)
    assert "prompt and chosen, 7 tokens; the score is read at [[…]]: p good[[</s>]]" in text
    assert "prompt and rejected, 6 tokens; the score is read at [[…]]: p bad[[</s>]]" in text


def test_the_chat_template_is_seen(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}])
    text = shown(path, "--tokenizer", byte_tokenizer)
    assert "recognised as │ prompt (conversational): 1" in text
    assert "prompt, 11 tokens; the policy writes what follows: <user>Hi<a>" in text


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer .*none: cannot be loaded"):
        shown(write(tmp_path / "a.jsonl", ROWS), "--tokenizer", tmp_path / "none")
