"""Every kind of source behind one interface: what counts as a score, and what an error says."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.schema import FunctionReward, HttpReward, VerifyReward
from pipeline.errors import UserError
from pipeline.recipes.quickstart import corpus
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.source import Source, build, checked

pytestmark = pytest.mark.fast

PROMPTS, RESPONSES, ROWS = ["p", "q"], ["a", "b" * 300], [{"n": 1}, {"n": 2}]


def answering(answer: Any) -> Source:
    return Source("function:m:f", 1.0, lambda prompts, responses, rows: answer)


def scores(answer: Any) -> list[float]:
    return checked(answering(answer), PROMPTS, RESPONSES, ROWS)


@pytest.mark.parametrize(
    "answer",
    [
        [0.5, 1],
        (0.5, True),
        [np.float32(0.5), np.int64(1)],
        [np.float16(0.5), np.bool_(True)],
        np.array([0.5, 1.0]),
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16),
        [torch.tensor(0.5), torch.tensor(True)],
        (value for value in (0.5, 1.0)),
    ],
    ids=["int", "bool", "numpy", "numpy bool", "array", "tensor", "torch scalars", "generator"],
)
def test_numbers_of_every_kind(answer: Any) -> None:
    found = scores(answer)
    assert found == [0.5, 1.0]
    assert [type(score) for score in found] == [float, float]


@pytest.mark.parametrize(
    ("answer", "row", "reason"),
    [
        (None, None, "returned NoneType, not a list of scores"),
        (0.5, None, "returned float, not a list of scores"),
        ([0.5], None, "returned 1 scores for 2 responses"),
        ([0.5, 1.0, 0.0], None, "returned 3 scores for 2 responses"),
        ([0.5, None], 1, "its score is None, not a number"),
        ([0.5, "1.0"], 1, "its score is '1.0', not a number"),
        (np.array([["1", "2"], ["3", "4"]]), 0, "not a number"),
        (torch.ones(2, 1), 0, "its score is tensor([1.]), not a number"),
        ([float("nan"), 0.5], 0, "its score is nan, not finite"),
        ([0.5, np.float32("inf")], 1, "not finite"),
        ([0.5, float("-inf")], 1, "its score is -inf, not finite"),
        ([0.5, 10**5000], 1, "not finite"),
        ([0.5, -1e39], 1, "its score is -1e+39, not finite"),
    ],
)
def test_what_is_no_list_of_scores(answer: Any, row: int | None, reason: str) -> None:
    with pytest.raises(SourceError) as caught:
        scores(answer)
    error = caught.value
    assert reason in error.reason
    assert (error.source, error.row) == ("function:m:f", row)
    assert (error.prompt, error.response) == ((None, None) if row is None else (PROMPTS[row], RESPONSES[row]))
    assert not isinstance(error, SourceUnavailable)


def test_a_source_that_raises() -> None:
    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [rows[0]["m"]]

    with pytest.raises(SourceError) as caught:
        checked(Source("function:m:f", 1.0, judge), PROMPTS, RESPONSES, ROWS)
    assert str(caught.value) == "reward source function:m:f: raised KeyError: 'm'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_source_error_passes_as_it_is() -> None:
    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        raise SourceUnavailable("http:h", None, "down")

    with pytest.raises(SourceUnavailable, match=r"^reward source http:h: down$"):
        checked(Source("http:h", 1.0, judge), PROMPTS, RESPONSES, ROWS)


def test_message_shows_row_and_texts_cut_and_survives_pickling() -> None:
    with pytest.raises(SourceError) as caught:
        scores([0.5, None])
    expected = (
        f"reward source function:m:f, row 1: its score is None, not a number\n  prompt: 'q'\n  response: '{'b' * 200}'…"
    )
    assert str(caught.value) == expected
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.row, again.response) == (expected, 1, RESPONSES[1])


def test_names_and_weights() -> None:
    function = build(FunctionReward(function="pipeline.recipes.quickstart.corpus:judge", weight=0.5), "here")
    assert (function.name, function.weight) == ("function:pipeline.recipes.quickstart.corpus:judge", 0.5)
    http = build(HttpReward(http="https://[::1]:80/score/it?scale=7", weight=-1.0), "here")
    assert (http.name, http.weight) == ("http:::1:80/score/it", -1.0)
    assert build(HttpReward(http="http://example.org"), "here").name == "http:example.org"
    assert build(VerifyReward(verify="exact_answer"), "here").name == "verify:exact_answer"


def test_the_quickstart_judge_is_a_source() -> None:
    source = build(FunctionReward(function="pipeline.recipes.quickstart.corpus:judge"), "here")
    prompt = "Anna visits the cave. What does she see?\n"
    responses = ["The cave has a golden pool.", "The cave has a pool."]
    assert checked(source, [prompt] * 2, responses, [{}] * 2) == [1.0, 0.0]
    assert source.judge is corpus.judge


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("no_such_module:f", "no_such_module:f cannot be imported: ModuleNotFoundError"),
        ("rewards:g", "rewards:g cannot be imported: AttributeError"),
        ("broken:f", "broken:f cannot be imported: SyntaxError"),
        (":f", ":f cannot be imported: ValueError"),
        ("rewards:number", "rewards:number is not a function"),
        ("rewards:two", "rewards:two does not take three arguments: too many positional arguments"),
    ],
)
def test_functions_that_cannot_be_used(name: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards.py").write_text("number = 3\ndef two(prompts, replies): return [0.0]\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        build(FunctionReward(function=name), "recipe.yaml: reward")
    assert str(caught.value).startswith(f"recipe.yaml: reward: {found}")


@pytest.mark.parametrize("url", ["http://", "http:///score", "http://host:port/", "http://[::1/"])
def test_addresses_that_name_no_host(url: str) -> None:
    with pytest.raises(UserError) as caught:
        build(HttpReward(http=url), "here")
    assert caught.value.expected == "http://host:port/path"


def test_callables_without_a_signature_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiled.py").write_text("score = max\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    load: Callable[..., Any] = build(FunctionReward(function="compiled:score"), "here").judge
    assert load is max
