"""The chat judge against a real server on this machine: both orders, ties, what cannot be read, and failing endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.evaluate import ChatJudge
from pipeline.errors import UserError
from pipeline.scoring.chat import Chat, score, verdict
from pipeline.scoring.errors import SourceError, SourceUnavailable
from tests.support.endpoint import Script, Server, always, reply, serving

pytestmark = pytest.mark.fast


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


def message(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


def says(text: str) -> Script:
    return always(message(text))


def shorter(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """Prefers the shorter answer."""
    question = asked["messages"][0]["content"]
    a, b = (question.split(f"<answer_{side}>\n")[1].split(f"\n</answer_{side}>")[0] for side in "ab")
    said = "C" if len(a) == len(b) else "A" if len(a) < len(b) else "B"
    reply(request, message(f"Rather [[A]] or [[B]]? Because it is short: [[{said}]]"))


def judge(server: Server, **settings: Any) -> Chat:
    base = server.url.removesuffix("/score")
    block = ChatJudge(chat=f"{base}/v1/", model="some-judge", **{"backoff": 0.001, "timeout": 5.0} | settings)
    return Chat(block, "here")


def test_what_is_asked(server: Server) -> None:
    server.script = shorter
    judge(server, max_tokens=7)(["Say hi."], ["hi"], ["hello"])
    first, second = sorted(server.requests, key=lambda asked: "<answer_a>\nhi\n" not in asked["messages"][0]["content"])
    for asked, (a, b) in ((first, ("hi", "hello")), (second, ("hello", "hi"))):
        assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("some-judge", 0.0, 7)
        (turn,) = asked["messages"]
        assert turn["role"] == "user"
        assert f"<request>\nSay hi.\n</request>\n\n<answer_a>\n{a}\n</answer_a>\n\n<answer_b>\n{b}\n" in turn["content"]


def test_a_judge_that_minds_the_reply_wins_in_both_orders(server: Server) -> None:
    server.script = shorter
    found = judge(server)(["p"] * 3, ["a", "long", "same"], ["longer", "b", "even"])
    assert found == [("A", "B"), ("B", "A"), ("C", "C")]
    assert [score(answers) for answers in found] == [1.0, 0.0, 0.5]


def test_a_judge_that_minds_the_place_is_all_ties(server: Server) -> None:
    server.script = says("[[A]]")
    found = judge(server)(["p", "q"], ["a", "b"], ["c", "d"])
    assert found == [("A", "A")] * 2
    assert [score(answers) for answers in found] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("answers", "value"),
    [(("A", "C"), 0.5), (("C", "B"), 0.5), (("A", ""), 0.5), (("", ""), 0.5), (("B", "A"), 0.0), (("A", "B"), 1.0)],
)
def test_one_order_alone_is_a_tie(answers: Any, value: float) -> None:
    assert score(answers) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [("[[A]]", "A"), ("no idea", ""), ("First [[B]], no: [[A]]", "A"), ("[A]", ""), ("", ""), ("**[[C]]**", "C")],
)
def test_verdicts(text: str, found: str) -> None:
    assert verdict(text) == found


def test_texts_with_the_question_s_own_places_stay_as_they_are(server: Server) -> None:
    server.script = says("[[C]]")
    judge(server)(["{a} and {b}"], ["{prompt}"], ["{b}"])
    assert "<request>\n{a} and {b}\n</request>" in server.requests[0]["messages"][0]["content"]


def test_busy_endpoints_are_asked_again(server: Server) -> None:
    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        reply(request, b"busy", 429) if len(server.requests) <= 2 else shorter(request, asked)

    server.script = script
    assert judge(server, together=1)(["p"], ["a"], ["bb"]) == [("A", "B")]
    assert len(server.requests) == 4


def test_endpoints_that_stay_broken_are_told(server: Server) -> None:
    server.script = always(b"no memory", 500)
    with pytest.raises(
        SourceUnavailable, match=r"chat:127.0.0.1:\d+/v1/chat/completions: failed .* HTTP 500: no memory"
    ):
        judge(server, retries=1)(["p"], ["a"], ["b"])


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"text": "[[A]]"}]}', b"[1]"])
def test_replies_that_are_no_message(server: Server, body: bytes) -> None:
    server.script = always(body)
    with pytest.raises(SourceError, match="its reply has no message"):
        judge(server)(["p"], ["a"], ["b"])


def test_the_key_goes_into_the_header_and_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    heard: list[str | None] = []

    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        heard.append(request.headers["Authorization"])
        reply(request, b"bad key", 401)

    server.script = script
    with pytest.raises(SourceError) as raised:
        judge(server, key_env="JUDGE_KEY", together=1)(["p"], ["a"], ["b"])
    assert heard[0] == "Bearer s3cret"
    assert "s3cret" not in str(raised.value) + json.dumps(server.requests)


def test_no_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="the environment variable JUDGE_KEY is not set"):
        judge(server, key_env="JUDGE_KEY")


def test_a_question_of_one_s_own(server: Server, tmp_path: Path) -> None:
    server.script = says("[[A]]")
    block = ChatJudge(chat=server.url.removesuffix("/score"), model="m")
    (tmp_path / "q.txt").write_text("{prompt}|{a}|{b}")
    Chat(block, "here", tmp_path / "q.txt")(["p"], ["x"], ["y"])
    assert sorted(asked["messages"][0]["content"] for asked in server.requests) == ["p|x|y", "p|y|x"]
    (tmp_path / "q.txt").write_text("{prompt}|{a}")
    with pytest.raises(UserError, match=r"has no place for \{b\}"):
        Chat(block, "here", tmp_path / "q.txt")
    with pytest.raises(UserError, match="cannot be read"):
        Chat(block, "here", tmp_path / "none.txt")
