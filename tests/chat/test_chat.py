"""`relay chat` in a real terminal and over pipes, against plain transformers."""

from __future__ import annotations

import io
import json
import os
import platform
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.chat import terminal
from pipeline.chat.command import chat
from pipeline.chat.terminal import plain
from pipeline.data.templates import PLAIN
from pipeline.errors import UserError
from pipeline.published import open_model
from tests.support import published, tiny

BASE = tiny.QUICKSTART / "base"
Talk = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return published.run(published.recipe(folder), folder / "run", ("sft", "reward", "ppo", "whole", "packed"))


@pytest.fixture
def talk(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """`talk(lines, …)`: what `relay chat` prints when the lines come over a pipe."""

    def over_pipe(lines: list[str], stage: str = "ppo", **options: Any) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        chat(str(run), stage, **{"greedy": True, "longest": 8, **options})
        return capsys.readouterr().out.removesuffix("\n").split("\n")

    return over_pipe


def said(folder: Path | None, messages: list[dict[str, str]] | str, tokens: int = 8) -> str:
    """The greedy answer by PEFT and transformers; the base's without a folder."""
    tok = AutoTokenizer.from_pretrained(folder or BASE)
    tok.chat_template = tok.chat_template or PLAIN
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    text = messages
    if not isinstance(messages, str):
        text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tok(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.eval().generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
    return str(tok.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_turns_are_answered_and_remembered_until_reset(talk: Talk, run: Path) -> None:
    output = run / "ppo" / "output"
    first = said(output, [user("hello")])
    answer = {"role": "assistant", "content": first.strip()}
    second = said(output, [user("hello"), answer, user("and then?")])
    found = talk(["hello", "and then?", "/reset", "and then?", "/quit", "never read"])
    assert "\n".join(found) == "\n".join([first, second, "(forgotten)", said(output, [user("and then?")])])
    assert second != said(output, [user("and then?")]), "what was said counts"


def test_two_models_on_one_base(talk: Talk, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is loaded once; each answers as alone, and goes on with its own words."""
    loads: list[str] = []
    real = AutoModelForCausalLM.from_pretrained

    def counted(name: str, *args: Any, **options: Any) -> Any:
        loads.append(name)
        return real(name, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    found = "\n".join(talk(["In winter,", "and?"], compare="sft"))
    assert loads == [str(BASE)]
    parts = []
    for stage in ("ppo", "sft"):
        output = run / stage / "output"
        first = said(output, [user("In winter,")])
        parts.append(
            (first, said(output, [user("In winter,"), {"role": "assistant", "content": first.strip()}, user("and?")]))
        )
    (ppo, then_ppo), (sft, then_sft) = parts
    assert found == f"ppo: {ppo}\nsft: {sft}\nppo: {then_ppo}\nsft: {then_sft}"
    assert ppo != sft


def test_beside_the_base_itself(talk: Talk, run: Path) -> None:
    found = "\n".join(talk(["In winter,"], compare="base"))
    assert (
        found == f"ppo: {said(run / 'ppo' / 'output', [user('In winter,')])}\nbase: {said(None, [user('In winter,')])}"
    )


def test_different_bases_are_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    chat(str(run), "ppo", compare="packed", greedy=True, longest=4)
    assert (
        "ppo and packed share no base, or have adapters of two kinds: both are loaded whole" in capsys.readouterr().err
    )


def test_raw_text_goes_as_it_is(talk: Talk, run: Path) -> None:
    asked = "In winter, Hugo visits the palace. What does he see?\n"
    expected = said(run / "ppo" / "output", asked)
    assert "\n".join(talk([asked.replace("\n", "\\n")] * 2, raw=True)) == f"{expected}\n{expected}"


def test_commands_and_a_conversation_that_is_too_long(talk: Talk) -> None:
    found = talk(["", "/help", "/nothing", "one " * 200, "/quit"])
    assert found[:3] == [
        "/reset  forget the conversation",
        "/quit   leave, as do Ctrl-D and Ctrl-C twice; Ctrl-C once stops an answer",
        "/help   this",
    ]
    assert found[3] == "(no command /nothing; /help tells them)"
    assert found[4].startswith("(this conversation has ")
    assert found[4].endswith("and the model's context holds 128: /reset, or ask less)")


def test_sampling_is_the_seed_s(talk: Talk) -> None:
    options = {"raw": True, "greedy": False, "longest": 20}
    one, again, other = (talk(["At noon,\\n"] * 2, **options, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] != one[-1], "each answer of a session has noise of its own"
    likeliest = talk(["At noon,\\n"], raw=True, longest=20)
    options = {"raw": True, "greedy": False, "longest": 20}
    assert talk(["At noon,\\n"], **options, temperature=1e-4) == likeliest
    assert talk(["At noon,\\n"], **options, temperature=0.0) == likeliest
    assert talk(["At noon,\\n"], **options, top_k=1) == likeliest
    assert talk(["At noon,\\n"], **options, top_p=1e-6) == likeliest


def test_a_file_of_prompts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"In winter, {name} visits the palace." for name in ("Hugo", "Emma", "Leo")]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    rows = [{"prompt": prompts[0]}, {"messages": [user(prompts[1])]}, {"prompt": prompts[2]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("p.txt", "p.jsonl"):
        chat(str(run), "ppo", compare="sft", batch=tmp_path / name, to=tmp_path / f"{name}.out", greedy=True, longest=8)
    lines = [
        [json.loads(line) for line in (tmp_path / f"{n}.out").read_text().splitlines()] for n in ("p.txt", "p.jsonl")
    ]
    expected = [{s: said(run / s / "output", [user(p)]) for s in ("ppo", "sft")} for p in prompts]
    assert [row["replies"] for row in lines[0]] == [row["replies"] for row in lines[1]] == expected
    assert [row["prompt"] for row in lines[0]] == prompts
    capsys.readouterr()
    chat(str(run), "ppo", batch=tmp_path / "p.txt", longest=8, seed=3)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == prompts


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"stage": "reward"}, "of kind reward, which publishes a classifier"),
        ({"compare": "ppo"}, "--compare ppo: it is the model itself"),
        ({"compare": "sfft"}, "stage sfft: not published"),
        ({"to": "new"}, "--to .*new: there is no --batch"),
        ({"batch": "p.txt", "to": "old"}, "--to .*old: it is there already"),
        ({"batch": "nothing.txt"}, "no such file"),
        ({"batch": "empty.txt"}, "no prompt in it"),
        ({"batch": "bad.jsonl"}, "bad.jsonl, row 1: no `prompt` and no `messages`"),
        (
            {"batch": "long.txt", "longest": 127},
            r"prompt 1: \d+ tokens, and the model's context holds 128[\s\S]*fix: --max-new-tokens \d+",
        ),
        ({"top_p": 0.0}, "--top-p 0: it leaves no token"),
    ],
)
def test_refused(run: Path, tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    files = {"p.txt": "a", "old": "x", "empty.txt": "\n", "bad.jsonl": '{"text": "a"}\n', "long.txt": "a\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    given = {key: tmp_path / value if key in ("to", "batch") else value for key, value in asked.items()}
    with pytest.raises(UserError, match=words):
        chat(**{"run": str(run), "stage": "ppo", **given})
    assert (tmp_path / "old").read_text() == "x"


def test_what_a_model_says_does_not_steer_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x07\rc\n\td\x9be") == "a[2Jbc\n\tde"


WAITS = {"x86_64": {"0", "7", "23", "270", "271"}, "aarch64": {"63", "72", "73"}}[platform.machine()]
"""Numbers of the system calls that wait for a key: read, poll and select and their kin."""


class Terminal:
    """A real terminal with a program in it."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "COLUMNS": "100", "TERM": "xterm"})
        self.shown = ""

    def until(self, words: str, start: int = 0) -> int:
        """Wait until `words` show, from place `start` on; the place after them."""
        limit = time.monotonic() + 90
        while (place := self.shown.find(words, start)) < 0:
            assert time.monotonic() < limit, self.shown
            if select.select([self.master], [], [], 0.5)[0]:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
        return place + len(words)

    def prompted(self, start: int) -> int:
        """Wait until the program reads a line; readline overlooks a Ctrl-C in the moment before it does."""
        place = self.until("> ", start)
        calls, limit = Path(f"/proc/{self.pid}/task/{self.pid}/syscall"), time.monotonic() + 90
        while calls.read_text().split()[0] not in WAITS:
            assert time.monotonic() < limit
            time.sleep(0.05)
        return place

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def left(self) -> int:
        """The exit code."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.alone
def test_in_a_terminal(run: Path) -> None:
    """Two columns; Ctrl-C stops an answer that would go on; Ctrl-C twice leaves, without a traceback."""
    command = [sys.executable, "-m", "pipeline.cli", "chat", str(run), "--stage", "ppo", "--compare", "sft", "--raw"]
    terminal = Terminal([*command, "--max-new-tokens", "100", "--temperature", "1.5", "--seed", "1"])
    try:
        place = terminal.until("ppo and sft; /help tells the commands")
        place = terminal.until("> ", place)
        terminal.type("In winter,\n")
        place = terminal.until("│", place)  # the table is drawn while the first answer comes
        terminal.type("\x03")
        place = terminal.until("(Ctrl-C again, Ctrl-D or /quit leaves)", place)
        place = terminal.until("> ", place)
        terminal.type("/help\n")
        place = terminal.prompted(terminal.until("forget the conversation", place))
        terminal.type("\x03")
        place = terminal.prompted(terminal.until("(Ctrl-C again, Ctrl-D or /quit leaves)", place))
        terminal.type("\x03")
        assert terminal.left() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
    assert "ppo" in terminal.shown
    assert "Traceback" not in terminal.shown


def test_the_default_stage_is_the_last_policy(run: Path) -> None:
    with pytest.raises(UserError, match="3 policies that no other was made from: packed, ppo, whole"):
        open_model(run, None)


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(talk: Talk, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes as the first piece is shown."""
    real, fired = terminal._say, []

    def say(text: str) -> None:
        real(text)
        if text.strip() and not fired:
            fired.append(text)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal, "_say", say)
    first, told, *second = talk(["In winter,", "and?"], longest=40)
    output = run / "ppo" / "output"
    whole = said(output, [user("In winter,")], 40)
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    assert told == "(Ctrl-C again, Ctrl-D or /quit leaves)"
    turns = [user("In winter,"), {"role": "assistant", "content": first.strip()}, user("and?")]
    assert "\n".join(second) == said(output, turns, 40)
