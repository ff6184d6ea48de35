"""`relay serve`: transformers' server, started for real on a merged policy, asked over HTTP; the cache of what it serves."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import serve
from pipeline.errors import UserError
from pipeline.export import model
from pipeline.published import open_model


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def greedy(folder: Path, question: str, tokens: int) -> str:
    tok = AutoTokenizer.from_pretrained(folder)
    text = tok.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    ids = tok(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").generate(
            input_ids=ids, max_new_tokens=tokens, do_sample=False
        )
    return str(tok.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_chat_completion(run: Path, tmp_path: Path) -> None:
    """The answer is plain transformers' greedy one, and it listens on this machine's own address alone."""
    baton = open_model(run, "ppo")
    folder = serve.cached(run, baton)
    assert folder == run / ".exports" / f"ppo-{baton.content_hash[:12]}"
    port = free_port()
    command = serve.command(folder, "127.0.0.1", port, trust=False)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder.parent, stdout=log, stderr=log)
    try:
        until, url = time.monotonic() + 120, f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.1)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        asked = "In winter, Hugo visits the palace."
        answer = client.chat.completions.create(
            model=folder.name, messages=[{"role": "user", "content": asked}], max_tokens=8, temperature=0
        )
        assert answer.choices[0].message.content == greedy(folder, asked, 8)
        listening = Path(f"/proc/{server.pid}/net/tcp")
        if listening.is_file():
            bound = [line.split()[1] for line in listening.read_text().splitlines()[1:]]
            assert f"0100007F:{port:04X}" in bound, "127.0.0.1"
            assert f"00000000:{port:04X}" not in bound
    finally:
        server.terminate()
        server.wait(30)


def test_what_was_exported_is_used_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baton = open_model(run, "ppo")
    folder = serve.cached(run, baton)
    before = (folder / "model.safetensors").stat().st_mtime_ns

    def never(*args: object, **options: object) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(model, "full", never)
    assert serve.cached(run, baton) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="exported again"):
        serve.cached(run, baton, "bf16")
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_without_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("json", "no_such_module"))
    with pytest.raises(UserError, match=r'not installed: no_such_module[\s\S]*pip install "relay-rlhf\[serve\]"'):
        serve.serve(str(run), "ppo")
    assert not (run / ".exports" / "whole").exists()


def test_a_reward_model_is_not_served(run: Path) -> None:
    with pytest.raises(UserError, match="of kind reward, which publishes a classifier, which writes no text"):
        serve.serve(str(run), "reward")


def test_the_command_replaces_this_process(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what is served named as clients must name it."""
    begun: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, arguments: begun.append([program, *arguments]))
    monkeypatch.chdir(run)  # and back to where it was, after `serve` went elsewhere
    serve.serve(str(run), "ppo", port=8123)
    name = serve.cached(run, open_model(run, "ppo")).name
    assert begun == [[sys.executable, *serve.command(run / ".exports" / name, "127.0.0.1", 8123, trust=False)]]
    assert f"http://127.0.0.1:8123/v1 as model {name}" in capsys.readouterr().out
    assert Path.cwd() == run / ".exports"
