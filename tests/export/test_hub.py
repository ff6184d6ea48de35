"""`--push-to-hub` against a server that speaks the hub's interface: what arrives, who is let in, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.errors import UserError
from pipeline.export.command import export
from tests.support import hub

TOKEN = "hf_never-to-be-seen"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub.Hub]:
    with hub.serving() as started:
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers speak another protocol
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield started


def test_every_file_arrives_and_the_token_shows_nowhere(
    server: hub.Hub, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    folder = tmp_path / "out"
    export(str(run), "whole", to=folder, repo="me/story", private=True)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert server.repos["me/story"] == {"private": True, "files": files}
    assert {"README.md", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)
    assert server.tokens == {f"Bearer {TOKEN}"}
    said = capfd.readouterr()
    assert f"{server.url}/me/story/commit/" in said.out
    assert TOKEN not in said.out + said.err + caplog.text
    assert all(TOKEN.encode() not in content for content in files.values())


def test_a_public_repository_does_not_become_private(server: hub.Hub, run: Path, tmp_path: Path) -> None:
    """Nor is anything put there."""
    server.repos["me/story"] = {"private": False, "files": {}}
    with pytest.raises(UserError, match="it is there already and public"):
        export(str(run), "whole", to=tmp_path / "out", repo="me/story", private=True)
    assert server.repos["me/story"]["files"] == {}
    assert (tmp_path / "out" / "README.md").is_file(), "the export itself is whole"


def test_a_hub_that_refuses(server: hub.Hub, run: Path, tmp_path: Path) -> None:
    server.refuses = 403
    with pytest.raises(UserError, match=r"the hub did not take it: .*403[\s\S]*hf upload other/story") as error:
        export(str(run), "whole", to=tmp_path / "out", repo="other/story")
    assert TOKEN not in str(error.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("stage", "repo", "token", "words"),
    [
        ("whole", "a/b/c", TOKEN, "--push-to-hub a/b/c: Repo id must be"),
        ("whole", "me/story", None, "--push-to-hub me/story: no token\n  fix: hf auth login"),
        ("ppo", "me/story", TOKEN, "a folder of this machine, .*base, which nobody else can open"),
    ],
)
def test_refused_before_anything_is_made(
    server: hub.Hub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    repo: str,
    token: str | None,
    words: str,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=words):
        export(str(run), stage, to=tmp_path / "out", repo=repo)
    assert not (tmp_path / "out").exists()
    assert server.repos == {}
