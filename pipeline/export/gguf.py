"""An exported model as a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shutil
import subprocess  # nosec B404
import sys
from pathlib import Path

from pipeline.config.block import Dtype
from pipeline.errors import UserError

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "RELAY_GGUF_CONVERTER"
TYPES: dict[Dtype, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def converter() -> list[str]:
    """How to start the converter: the file that RELAY_GGUF_CONVERTER names, under this Python, else the program on PATH.
    Raises UserError where there is none."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"{VARIABLE}={given}", "no such file", expected=f"llama.cpp's {SCRIPT}")
        return [sys.executable, given]
    found = shutil.which(SCRIPT)
    if found is None:
        raise UserError(
            "--gguf",
            f"llama.cpp's converter, {SCRIPT}, is not on PATH",
            expected="a checkout of llama.cpp with what its requirements ask for",
            fix="git clone https://github.com/ggml-org/llama.cpp && pip install gguf sentencepiece && "
            f"export {VARIABLE}=$PWD/llama.cpp/{SCRIPT}",
        )
    return [found]


def convert(start: list[str], model: Path, target: Path, kind: str) -> None:
    """Write the model in folder `model` to `target` with weights of type `kind`. Raises UserError with the converter's last
    words where it fails, as for a tokenizer that llama.cpp does not know."""
    asked = [*start, str(model), "--outfile", str(target), "--outtype", kind, "--model-name", target.stem]
    done = subprocess.run(asked, capture_output=True, text=True, errors="replace")  # nosec B603
    if done.returncode != 0 or not target.is_file():
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(
            " ".join(asked),
            f"it ended with exit code {done.returncode}: {said[-1] if said else 'no message'}",
            fix="export without --gguf; llama.cpp knows a model by its architecture and by its tokenizer",
        )
