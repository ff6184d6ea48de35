"""Everything that needs a GPU, in one run: arithmetic on CUDA, rollouts with CUDA graphs, the chain under every ZeRO stage, and
the benchmarks. Under nine minutes on an H200 is what it is written for; each row is kept and not run again.

python scripts/gpu_check.py                              # every row that has not passed; writes docs/results/gpu.md
python scripts/gpu_check.py --rows rollouts decode       # some of them
python scripts/gpu_check.py --cpu --rows numbers         # what runs without a GPU: numbers, rollouts, largest (a toy)

`--trl DIR` is where TRL 1.12 is installed (`pip install --no-deps --target DIR/trl-1.12 trl==1.12.0`), for the PPO rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(ROOT)]

import shapes  # noqa: E402
from turns import Side  # noqa: E402

from pipeline.config.schema import Sampling  # noqa: E402
from pipeline.generation import engines  # noqa: E402
from pipeline.generation.rollout import keys  # noqa: E402
from scripts.bench_ppo import PARTS, recipe  # noqa: E402
from scripts.compare_trl import SETTINGS, commit  # noqa: E402
from tests.support import tiny  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu.md")
    parser.add_argument("--kept", type=Path, default=Path("runs/gpu_check"), help="where each row's result is kept")
    parser.add_argument("--again", action="store_true", help="run rows that have passed too")
    parser.add_argument("--trl", type=Path, default=Path("runs/compare_trl"))
    parser.add_argument("--cpu", action="store_true", help="without a GPU: what can be tried there; writes no page")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.cpu:
        raise SystemExit("no GPU here: nothing is measured (--cpu tries what runs without one)")
    arguments.kept.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in arguments.rows:
        file = arguments.kept / f"{name}.json"
        if file.exists() and not arguments.again and json.loads(file.read_text(encoding="utf-8"))["passed"]:
            continue
        began = time.monotonic()
        try:
            passed, found = True, ROWS[name](arguments)
        except (Exception, SystemExit) as error:
            passed, found = False, [f"{type(error).__name__}: {line}" for line in str(error).splitlines()[-12:]]
        record = {
            "passed": passed,
            "lines": found,
            "seconds": round(time.monotonic() - began, 1),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit(),
            "versions": {library: version(library) for library in LIBRARIES},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "python": platform.python_version(),
        }
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")
        failed += not passed
        print(f"{name}: {'passed' if passed else 'FAILED'} in {record['seconds']} s", *found, sep="\n  ", flush=True)
    if not arguments.cpu:
        arguments.out.write_text(page(arguments.kept), encoding="utf-8")
    sys.exit(1 if failed else 0)


# ---- the rows


def numbers(arguments: argparse.Namespace) -> list[str]:
    """Advantages, losses and KL estimates in float32 on the device against float64 on the CPU: 2e-5 of the largest entry."""
    from stages.ppo.advantage import ESTIMATORS, Given
    from stages.ppo.experience import whiten
    from stages.ppo.kl import estimate
    from stages.ppo.loss import policy_loss, value_loss

    device, draw, worst = _device(), torch.Generator().manual_seed(0), {}

    def compare(name: str, function: Callable[..., Any], *values: Any) -> None:
        exact = function(*(v.double() if isinstance(v, torch.Tensor) else v for v in values))
        found = function(*(v.float().to(device) if isinstance(v, torch.Tensor) else v for v in values))
        pairs = zip(*((side if isinstance(side, tuple) else (side,)) for side in (exact, found)), strict=True)
        for a, b in pairs:
            if a is not None:
                error = float((a.double() - b.double().cpu()).abs().max() / a.double().abs().max().clamp(min=1e-6))
                worst[name] = max(worst.get(name, 0.0), error)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    lengths = torch.randint(1, 65, (32,), generator=draw)
    mask = (torch.arange(64) < lengths.unsqueeze(1)).float()
    rewards, values, old, new = (normal(32, 64) * mask for _ in range(4))
    for name, estimator in ESTIMATORS.items():

        def advantages(r: Any, v: Any, m: Any, b: Any, compute: Any = estimator.compute) -> Any:
            return compute(Given(r, v, m, b, 4, 0.99, 0.95, True))

        compare(f"advantages {name}", advantages, rewards, values, mask, normal(32))
    compare("whiten", whiten, values, mask)
    compare("policy loss", lambda n, o, a: policy_loss(n, o, a, 0.2, 3.0)[0], 0.1 * new, 0.1 * old, rewards)
    compare("value loss", lambda n, o, r: value_loss(n, o, r, 0.2)[0], new, old, rewards)
    for kind in ("k1", "k3"):
        compare(f"kl {kind}", lambda n, o, kind=kind: estimate(n, o, kind), 0.1 * new, 0.1 * old)
    bad = {name: error for name, error in worst.items() if not error <= 2e-5}
    if bad:
        raise AssertionError(f"off by more than 2e-5: {bad}")
    return [f"{len(worst)} functions, largest difference {max(worst.values()):.1e}"]


def rollouts(arguments: argparse.Namespace) -> list[str]:
    """Tokens of the static engine (with CUDA graphs on a GPU) against Hugging Face's, greedy and sampled, five shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device, lines = _device(), []
    prompts = [[(17 * row + 7 * column) % 90 + 5 for column in range(3 + 5 * row)] for row in range(12)]
    noise = keys(0, 0, torch.arange(12), torch.zeros(12, dtype=torch.int64)).to(device)
    for name, values in tiny.SHAPES.items():
        settings = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **values}
        torch.manual_seed(0)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config).to(device).eval()
        for given in (None, noise):
            sampling = Sampling(max_response_length=40, batch=4)
            ours, theirs = (
                engines.sample(engine, model, prompts, given, sampling, pad=0, eos=[1]) for engine in ("static", "hf")
            )
            same = [ours.response(row) == theirs.response(row) for row in range(12)]
            apart = float((ours.logprobs - theirs.logprobs)[torch.tensor(same)].abs().max())
            how = "greedy" if given is None else "sampled"
            if not all(same) or apart > 1e-4:
                raise AssertionError(
                    f"{name}, {how}: {sum(same)} of 12 replies equal, log-probabilities {apart:.1e} apart"
                )
            lines.append(f"{name}, {how}: the same 12 replies, log-probabilities within {apart:.1e}")
    return lines


def zero(arguments: argparse.Namespace) -> list[str]:
    """SFT, reward and PPO by {LoRA, QLoRA, full} x ZeRO {0, 1, 2, 3} on one rank, opened by plain transformers and PEFT."""
    out = arguments.kept / "matrix.md"
    _run("matrix.py", "--ranks", "1", "--methods", "lora", "qlora", "full", "--out", str(out))
    return [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


def ppo_opt(arguments: argparse.Namespace) -> list[str]:
    """Time and memory of an update of OPT-1.3B beside TRL 1.12's."""
    return _table(_run("bench_ppo.py", "--rows", "gpu-opt", "--trl", str(arguments.trl)))


def ppo_llama(arguments: argparse.Namespace) -> list[str]:
    """The same of a 1B Llama."""
    return _table(_run("bench_ppo.py", "--rows", "gpu-llama", "--trl", str(arguments.trl)))


def decode(arguments: argparse.Namespace) -> list[str]:
    """A decode step of a 1B Llama, batch 64, against the copy bandwidth measured beside it."""
    shape = ["--shape", "llama-1b", "--dtype", "bfloat16", "--batch", "64", "--prompt", "256", "--response", "256"]
    return [_run("bench_decode.py", *shape, "--limit").splitlines()[-1]]


def largest(arguments: argparse.Namespace) -> list[str]:
    """PPO updates on nf4 bases of random weights made on the device, batch 8, 256+256 tokens, larger until one fails."""
    lines: list[str] = []
    for shape in ("llama-13b", "llama-34b", "llama-70b") if torch.cuda.is_available() else ("llama-15m",):
        try:
            turn = _update(shape)
        except SystemExit as error:
            lines.append(f"{shape}: does not complete: {str(error).splitlines()[-2]}")
            break
        lines.append(f"{shape}: an update in {turn['seconds']:.1f} s, peak {turn['peak_mib'] / 1024:.1f} GiB")
    if "does not complete" in lines[0]:
        raise AssertionError(lines[0])
    return lines


def _update(shape: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), Path(name) / "base"
        base.mkdir()
        config = shapes.config(shape)
        config.save_pretrained(base)
        shapes.words(base, config.vocab_size)
        save_file(
            {"seed": torch.zeros(1)}, base / "model.safetensors"
        )  # a base has weights; these are made and not read
        settings = SETTINGS | {
            "base": str(base),
            "prompts": str(shapes.prompts(work, 32, 256, config.vocab_size)),
            "batch": 8,
            "micro_batch": 1,
            "epochs": 1,
            "steps": 2,
            "prompt_tokens": 256,
            "response_tokens": 256,
            "lr": 1e-6,
            "dtype": "bfloat16",
        }
        described = recipe(settings)
        described["base"]["quantization"] = "nf4"
        described["stages"]["ppo"] |= {"gradient_checkpointing": True}
        described["stages"]["ppo"]["sampling"] |= {"adapter": "unmerged"}
        (work / "recipe.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
        command = [sys.executable, str(PARTS / "made_side.py"), str(work / "recipe.yaml"), str(work / "run")]
        side = Side(shape, command, work / "log", {"PYTHONPATH": os.pathsep.join([str(PARTS), str(ROOT)])})
        try:
            return side.turn()
        finally:
            side.close()


ROWS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "numbers": numbers,
    "rollouts": rollouts,
    "zero": zero,
    "decode": decode,
    "ppo-llama": ppo_llama,
    "ppo-opt": ppo_opt,
    "largest": largest,
}


# ---- around them


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _run(script: str, *arguments: str) -> str:
    """A script's standard output. Raises AssertionError with its last lines when it fails."""
    done = subprocess.run([sys.executable, str(HERE / script), *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(
            "\n".join([*(done.stdout + done.stderr).splitlines()[-10:], f"{script}: {done.returncode}"])
        )
    return done.stdout.strip()


def _table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def page(kept: Path) -> str:
    lines = ["# On a GPU", "", "`python scripts/gpu_check.py`; a row that is not here was not measured.", ""]
    for name, row in ROWS.items():
        file = kept / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        libraries = ", ".join(f"{library} {number}" for library, number in found["versions"].items())
        lines += [
            f"## {name}: {'passed' if found['passed'] else 'FAILED'}",
            "",
            (row.__doc__ or "").strip(),
            "",
            f"{found['date']}, commit {found['commit']}, {found['device']}, Python {found['python']}, {libraries}; "
            f"{found['seconds']} s.",
            "",
            "```",
            *found["lines"],
            "```",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
