"""Sources of reward over a rollout: weights, names, failures that stop and failures that skip. One process, real endpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from pipeline.config.schema import Ppo
from pipeline.data.encode import Encoder
from pipeline.errors import Trouble
from pipeline.generation.rollout import Rollout
from stages.ppo.rewards import Rewards, Skipped
from tests.stages.ppo.test_experience import block
from tests.support import tiny

pytestmark = pytest.mark.fast
TEXTS = [("Anna visits the palace.\n", "She sees 7 mirrors."), ("Ben is in the garden.\n", "")]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(tiny.QUICKSTART / "base"))


@pytest.fixture
def rollout(encoder: Encoder) -> Rollout:
    """Two responses: one of some words, one empty, which is EOS alone."""
    prompts = [encoder.prompt(prompt) for prompt, _ in TEXTS]
    replies = [encoder.reply(reply) for _, reply in TEXTS]
    width = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
    pad = encoder.tokenizer.pad_token_id
    return Rollout(
        torch.tensor([p + r + [pad] * (width - len(p) - len(r)) for p, r in zip(prompts, replies, strict=True)]),
        torch.tensor([len(p) for p in prompts]),
        torch.tensor([len(r) for r in replies]),
        torch.zeros(2, max(map(len, replies))),
        torch.tensor([True, True]),
    )


def rewards(encoder: Encoder, *sources: dict[str, Any]) -> Rewards:
    settings: Ppo = block(critic={"init": "policy"}).model_validate({**block().model_dump(), "reward": list(sources)})
    return Rewards.of(settings.reward, {}, encoder, "reward")


def score(encoder: Encoder, rollout: Rollout, *sources: dict[str, Any]) -> tuple[list[float], dict[str, list[float]]]:
    rows = [{"answer": "6 + 1 = #### 7"}, {"answer": "#### 0"}]
    total, parts = rewards(encoder, *sources)({}, rollout, rows)
    return total.tolist(), {name: part.tolist() for name, part in parts.items()}


def length(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    assert [p.strip() for p in prompts] == [prompt.strip() for prompt, _ in TEXTS]
    return [float(len(response.strip())) for response in responses]


def broken(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [1.0, float("nan")]


def test_weighted_sum_of_functions_and_checks(encoder: Encoder, rollout: Rollout) -> None:
    """0.5 x characters + 10 x the right answer - 1 x no digit; an empty response is scored like any other."""
    said = len(encoder.text(rollout.response(0)).strip())
    total, parts = score(
        encoder,
        rollout,
        {"function": "tests.stages.ppo.test_rewards:length", "weight": 0.5},
        {"verify": "exact_answer", "weight": 10.0},
        {"verify": "format", "pattern": "\\D*", "weight": -1.0},
        {"verify": "format", "pattern": ".*mirrors.*", "weight": 0.0},
    )
    assert parts == {
        "function:tests.stages.ppo.test_rewards:length": [float(said), 0.0],
        "verify:exact_answer": [1.0, 0.0],
        "verify:format": [0.0, 1.0],
        "verify:format#2": [1.0, 0.0],
    }
    assert total == [0.5 * said + 10.0, -1.0]


def test_failing_source_is_named_with_its_row(encoder: Encoder, rollout: Rollout) -> None:
    with pytest.raises(Trouble, match=r"function:tests\.stages\.ppo\.test_rewards:broken.*") as error:
        score(encoder, rollout, {"function": "tests.stages.ppo.test_rewards:broken"})
    assert "Ben is in the garden" in str(error.value)
    assert "nan" in str(error.value).lower()


class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [len(r["answer"]) for r in asked["rows"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_endpoint_sees_the_rows(encoder: Encoder, rollout: Rollout) -> None:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/score"
        assert score(encoder, rollout, {"http": url, "batch": 1})[0] == [14.0, 6.0]
    finally:
        server.shutdown()
        server.server_close()


def test_unreachable_endpoint_stops_or_skips(encoder: Encoder, rollout: Rollout) -> None:
    dead = {"http": "http://127.0.0.1:9/score", "retries": 0}
    with pytest.raises(Trouble):
        score(encoder, rollout, dead)
    with pytest.raises(Skipped):
        score(encoder, rollout, {**dead, "on_failure": "skip"})
    with pytest.raises(Trouble, match="broken"):  # a failure that stops goes before one that skips
        score(
            encoder,
            rollout,
            {**dead, "on_failure": "skip"},
            {"function": "tests.stages.ppo.test_rewards:broken"},
        )
