"""`--gguf`: the refusals, the command line that is built, and llama.cpp's own converter where it is at hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.export import gguf
from pipeline.export.command import export
from tests.support import published

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
model = Path(sys.argv[1])
if {fails}:
    sys.exit("BPE pre-tokenizer was not recognized")
told = {{"args": sys.argv[1:], "files": sorted(p.name for p in model.iterdir())}}
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(told))
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    """A program of the converter's name, the only one on PATH."""
    file = folder / "bin" / gguf.SCRIPT
    file.parent.mkdir()
    file.write_text(STAND_IN.format(python=sys.executable, fails=fails))
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent))
    monkeypatch.delenv(gguf.VARIABLE, raising=False)


def test_without_a_converter_nothing_is_begun(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py, is not on PATH[\s\S]*fix: git clone"):
        export(str(run), "ppo", to=tmp_path / "out", as_gguf=True)
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "not here.py"))
    with pytest.raises(UserError, match=r"RELAY_GGUF_CONVERTER=.*not here\.py: no such file"):
        export(str(run), "ppo", to=tmp_path / "out", as_gguf=True)
    assert not (tmp_path / "out").exists()


def test_the_converter_is_given_the_merged_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    export(str(run), "ppo", to=tmp_path / "story", as_gguf=True, dtype="fp16")
    told = json.loads((tmp_path / "story" / "story-f16.gguf").read_text())
    assert told["args"][2:] == [*told["args"][2:3], "--outtype", "f16", "--model-name", "story-f16"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(told["files"])
    assert "adapter_config.json" not in told["files"]
    assert "`story-f16.gguf` is the same model for llama.cpp" in (tmp_path / "story" / "README.md").read_text()
    export(str(run), "ppo", to=tmp_path / "other", as_gguf=True, gguf_type="q8_0")
    told = json.loads((tmp_path / "other" / "other-q8_0.gguf").read_text())
    assert told["args"][4] == "q8_0"


def test_what_the_converter_says_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, fails=True)
    with pytest.raises(UserError, match="--gguf: stage reward published a classifier"):
        export(str(run), "reward", to=tmp_path / "out", as_gguf=True)
    with pytest.raises(UserError, match="exit code 1: BPE pre-tokenizer was not recognized"):
        export(str(run), "ppo", to=tmp_path / "out", as_gguf=True)
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_llama_cpp_s_own_converter(test_data: Path, tmp_path: Path) -> None:
    """Weights read back by its `gguf` library, on a real model whose tokenizer it knows."""
    if gguf.VARIABLE not in os.environ:
        pytest.skip(f"llama.cpp's converter is not there; set {gguf.VARIABLE}")
    sys.path.insert(1, str(Path(os.environ[gguf.VARIABLE]).parent / "gguf-py"))
    import numpy as np
    from gguf import GGUFReader  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import load_file

    recipe = published.recipe(tmp_path, base__model=str(test_data / "stories260K"))
    published.publish(recipe, tmp_path / "run", "sft")
    export(str(tmp_path / "run"), "sft", to=tmp_path / "story", as_gguf=True)
    weights = load_file(tmp_path / "story" / "model.safetensors")
    read = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "story" / "story-f32.gguf").tensors}
    found = read["blk.0.ffn_down.weight"].reshape(weights["model.layers.0.mlp.down_proj.weight"].shape)
    np.testing.assert_array_equal(found, weights["model.layers.0.mlp.down_proj.weight"].numpy())
    assert len(read) >= len(weights)
