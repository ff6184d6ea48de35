"""Every fine-tuning method on four tasks, three seeds: trained parameters, memory, time, quality. One table and one plot.

    RELAY_TEST_DATA=FOLDER python scripts/compare_methods.py --work FOLDER      # writes docs/results/methods.md and .svg

- classification: movie reviews (positive or negative, from the last 250 characters), stages.classify on stories260K
- sft, reward: polite-pref on stories260K
- ppo: the embedded quickstart, from an SFT policy and a reward model that were trained in full, the same for all methods

Each case is a stage on one rank and one thread, in a process that has everything imported; two run at a time. What `--work`
holds already is not run again; `--report` runs nothing. Learning rates are by kind of method and were set beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import sys
import threading
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.config.methods import METHODS  # noqa: E402
from pipeline.config.schema import Adapter  # noqa: E402
from pipeline.memory import adapters, read, shape  # noqa: E402
from scripts.bench_plot import scatter  # noqa: E402
from scripts.compare_trl import commit  # noqa: E402
from tests.support.session import Ranks  # noqa: E402

DATA = Path(os.environ.get("RELAY_TEST_DATA", ROOT.parent / "shared" / "data"))
QUICKSTART = ROOT / "pipeline" / "recipes" / "quickstart"
OUT = ROOT / "docs" / "results" / "methods"
COMPARED = [method for method in METHODS if method != "qlora"]
RATES = {
    **dict.fromkeys(COMPARED, 5e-3),
    "full": 1e-3,
    **dict.fromkeys(("vera", "ia3", "ln_tuning", "bitfit"), 2e-2),
    **dict.fromkeys(("prefix_tuning", "p_tuning_v2", "prompt_tuning", "p_tuning"), 2e-2),
}
SLOWER = 5
"""PPO's learning rates are so many times lower."""
SMALL: dict[str, Any] = {
    "bottleneck_dim": 16,
    "num_virtual_tokens": 8,
    "encoder_hidden_size": 32,
    "r": 8,
    "alpha": 16.0,
}
OWN: dict[str, dict[str, Any]] = {"vera": {"r": 64}, "loreft": {"r": 4}, "direft": {"r": 4}}
TASKS = {
    "classification": ("glue", "validation/accuracy", "accuracy"),
    "sft": ("sft", "held_out/loss", "held-out loss"),
    "reward": ("reward", "held_out/accuracy", "pair accuracy"),
    "ppo": ("ppo", "eval/score", "held-out reward"),
}
"""Task -> (its stage, the metric that is its quality, what the page calls that)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and what was measured")
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="write the page from what was measured so far")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = Results(work / "measured.json")
    if not arguments.report:
        reviews(work / "reviews" / "SST-2")
        cases = list(itertools.product(arguments.tasks, arguments.seeds, arguments.methods))
        run_all([case for case in cases if case not in results and possible(case[0], case[2])], work, results)
    text = page(results, arguments.seeds)
    OUT.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


class Results:
    """Measured cases, by (task, seed, method), kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self.found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def __contains__(self, case: tuple[str, int, str]) -> bool:
        return "/".join(map(str, case)) in self.found

    def add(self, case: tuple[str, int, str], facts: dict[str, Any]) -> None:
        with self.lock:
            self.found["/".join(map(str, case))] = facts
            self.file.write_text(json.dumps(self.found, indent=1, sort_keys=True), encoding="utf-8")

    def of(self, task: str, method: str, seeds: list[int]) -> list[dict[str, Any]]:
        return [self.found[key] for seed in seeds if (key := f"{task}/{seed}/{method}") in self.found]


def possible(task: str, method: str) -> bool:
    return task != "ppo" or METHODS[method].shared


def run_all(cases: list[tuple[str, int, str]], work: Path, results: Results) -> None:
    """Two cases at a time, each in a process of its own that goes on with the next."""
    queue: Queue[tuple[str, int, str]] = Queue()
    if seeds := sorted({seed for task, seed, _ in cases if task == "ppo"}):
        parents(work, seeds)
    for case in cases:
        queue.put(case)

    def worker(number: int) -> None:
        ranks = None
        while True:
            try:
                case = queue.get_nowait()
            except Empty:
                break
            if ranks is None or not ranks.alive:
                ranks = Ranks(1, work / f"ranks-{number}-{time.time_ns()}")
            results.add(case, one(ranks, case, work))
            print(case, results.found["/".join(map(str, case))], flush=True)
        if ranks is not None:
            ranks.close()

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one(ranks: Ranks, case: tuple[str, int, str], work: Path) -> dict[str, Any]:
    """Run a case; its quality and seconds."""
    task, seed, method = case
    folder = work / "runs" / f"{task}-{method}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage, metric, _ = TASKS[task]
    if task == "ppo":
        for parent in ("sft", "reward"):
            shutil.copytree(work / "parents" / str(seed) / parent, folder / parent)
    asked = {"recipe": str(recipe(folder, task, seed, method, work)), "stage": stage, "run_dir": str(folder)}
    facts = dict(ranks.call("scripts.compare_methods:stage", timeout=1200, **asked)[0])
    manifest = json.loads((folder / stage / "output" / "manifest.json").read_text(encoding="utf-8"))
    facts["quality"] = manifest["metrics"][metric]
    facts["kl"] = manifest["metrics"].get("eval/kl")
    shutil.rmtree(folder)
    return facts


def stage(recipe: str, stage: str, run_dir: str) -> dict[str, float]:
    """In the warm process: run a stage; its seconds."""
    from tests.support.stages import run

    began = time.perf_counter()
    run(recipe, stage, run_dir)
    return {"seconds": time.perf_counter() - began}


def adapter(method: str) -> dict[str, Any]:
    small = {key: value for key, value in SMALL.items() if key in METHODS[method].options}
    return {"method": method, **small, **OWN.get(method, {})}


def recipe(folder: Path, task: str, seed: int, method: str, work: Path) -> Path:
    """A recipe of the task's stage (and, for PPO, the stages it stands on, which are published already)."""
    polite = str(DATA / "polite-pref" / "instruction-data-with-preference.json")
    common = {"lr": RATES[method], "batch": 16, "micro_batch": 16, "log_every": 10, "save_every": 1000}
    described: dict[str, Any] = {
        "name": f"{task}-{method}",
        "base": {"model": str(DATA / "stories260K"), "dtype": "fp32"},
        "adapter": adapter(method),
        "deepspeed": {"config": "zero0", "num_gpus": 1},
        "data": {"holdout": 0.15},
        "seed": seed,
    }
    if task == "classification":
        data = str(work / "reviews" / "SST-2")
        described["stages"] = {
            "glue": {"kind": "classify", "task": "sst2", "data": data, "steps": 60, "max_length": 128, **common}
        }
    elif task == "sft":
        described["stages"] = {
            "sft": {"kind": "sft", "data": [{"path": polite}], "steps": 60, "max_length": 256, **common}
        }
    elif task == "reward":
        described["stages"] = {
            "reward": {"kind": "reward", "data": [{"path": polite}], "steps": 40, "max_length": 256, **common}
        }
    else:
        described |= quickstart(adapter(method), RATES[method] / SLOWER)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    return file


def quickstart(block: dict[str, Any], lr: float) -> dict[str, Any]:
    """The embedded default, its first two stages trained in full."""
    shipped = yaml.safe_load(QUICKSTART.with_suffix(".yaml").read_text(encoding="utf-8"))["stages"]
    text = json.dumps({name: shipped[name] for name in ("sft", "reward", "ppo")})
    stages = json.loads(text.replace('"quickstart/', f'"{QUICKSTART}/'))
    stages["sft"] |= {"adapter": {"method": "full"}, "lr": 1e-3}
    stages["reward"] |= {"adapter": {"method": "full"}, "lr": 1e-3}
    stages["ppo"] |= {"steps": 20, "lr": lr, "save_every": 1000, "adapter": block}
    return {
        "base": {"model": str(QUICKSTART / "base"), "dtype": "fp32"},
        "data": {"holdout": 0.08},
        "stages": stages,
    }


def parents(work: Path, seeds: list[int]) -> None:
    """SFT policy and reward model of each seed."""
    ranks = Ranks(1, work / f"ranks-parents-{time.time_ns()}")
    for seed in seeds:
        folder = work / "parents" / str(seed)
        if (folder / "reward" / "output" / "manifest.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = str(recipe(folder, "ppo", seed, "full", work))
        ranks.call("tests.support.stages:chain", timeout=1200, recipe=path, run_dir=str(folder), until="reward")
    ranks.close()


def reviews(folder: Path) -> None:
    """Movie reviews as SST-2's files: the end of each review, 1600 to train on and 400 to score."""
    rows = []
    with zipfile.ZipFile(DATA / "movie-reviews" / "movie_reviews.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt"):
                text = " ".join(archive.read(name).decode().split())
                rows.append((text[-250:].partition(" ")[2], int("/pos/" in name)))
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:1600]), ("dev", rows[1600:])):
        lines = ["sentence\tlabel\n", *(f"{text}\t{label}\n" for text, label in part)]
        (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")


def parameters(method: str, base: Path) -> int:
    form = shape(read(str(base), "base", None), "base")
    block = Adapter(**adapter(method))
    return form.parameters if block.is_full else adapters.trained(block, form)


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "not measured"
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


HEAD = """# Fine-tuning methods side by side

`RELAY_TEST_DATA=FOLDER python scripts/compare_methods.py --work FOLDER`; {seeds} seeds, mean ± standard deviation over them.
{versions}.

Models are tiny ones, the only ones at hand: this shows that every method trains and what it costs, and is no ranking for large
models. stories260K (260 thousand weights) for classification, SFT and reward; the embedded quickstart model (558 thousand)
for PPO. One rank and one thread a case, two cases at a time on two cores. Learning rates are by kind of method, set
beforehand and not tuned: full {full:g}; VeRA, IA3, norms, biases, prefixes and prompts {large:g}; all others {other:g}; in PPO
a fifth.

- *parameters*: trained, of stories260K
- *classification*: accuracy on 400 movie reviews, of which the last 250 characters are read; 60 steps of 16. Chance is 0.50,
  and 0.55 differs from it at 95 %
- *SFT*: held-out loss in nats per token on polite-pref, 60 steps of 16; *reward*: accuracy on held-out pairs, 40 steps of 16
- *PPO*: held-out score of the reward model after 20 steps of 64, and the KL to the policy before, in nats per reply; that
  policy and the reward model were trained in full, the same for all methods of a seed
- AdaLoRA hardly moves in so few steps: its singular values start at 0 between factors that start small and are first made
  orthonormal, which takes most of a clipped gradient
- *s*: of the PPO stage, set-up included, at two cases on two cores
- *MiB*: what training holds beside the frozen base on a random 15M Llama in float32, 8 rows of 128 tokens: tensors kept for the
  backward pass of the blocks, counted one by one, and 16 bytes for each trained parameter (weight, gradient, Adam's moments)

"""


def memory(method: str) -> float:
    """MiB of what a training step of a 15M Llama holds beside its frozen weights."""
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    import torch
    from shapes import config
    from transformers import AutoModelForCausalLM

    from pipeline.adapters import build

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("llama-15m"))
    block = Adapter(**adapter(method))
    if block.is_full:
        trained = list(model.parameters())
    else:
        model = build.attach(model, block, "CAUSAL_LM", name="policy", steps=100)
        trained = build.trained(model, "policy")
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, kept = {p.data_ptr() for p in model.parameters()}, dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Their memory is not given to others while the result lives, so that every address is one tensor.
        result = plain.train().base_model(input_ids=torch.ones(8, 128, dtype=torch.int64), use_cache=False)
    assert result is not None
    return (sum(kept.values()) + 16 * sum(p.numel() for p in trained)) / 2**20


def page(results: Results, seeds: list[int]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "deepspeed"))
    versions += f"; {platform.machine()}, commit {commit()}"
    rates = {"full": RATES["full"], "large": RATES["vera"], "other": RATES["lora"]}
    head = HEAD.format(seeds=len(seeds), versions=versions, **rates)
    lines = [
        "| method | parameters | classification | SFT | reward | PPO | KL | s | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    points: dict[str, list[tuple[str, float, float]]] = {task: [] for task in TASKS}
    for method in COMPARED:
        count = parameters(method, DATA / "stories260K")
        found = {task: results.of(task, method, seeds) for task in TASKS}
        quality = {task: [case["quality"] for case in cases] for task, cases in found.items()}
        for task, values in quality.items():
            if values:
                points[task].append((method, count, statistics.mean(values)))
        ppo = found["ppo"]
        refused = "refused" if not METHODS[method].shared else "not measured"
        lines.append(
            f"| `{method}` | {count:,} | {spread(quality['classification'], 3)} | {spread(quality['sft'], 3)} "
            f"| {spread(quality['reward'], 3)} | {spread(quality['ppo'], 2) if ppo else refused} "
            f"| {spread([case['kl'] for case in ppo], 1) if ppo else ''} "
            f"| {spread([case['seconds'] for case in ppo], 0) if ppo else ''} "
            f"| {memory(method):.0f} |"
        )
    panels = [(f"{task}: {TASKS[task][2]}", points[task]) for task in TASKS if points[task]]
    OUT.with_suffix(".svg").write_text(scatter(panels, "trained parameters"), encoding="utf-8")
    return head + "\n".join(lines) + "\n\n![quality against trained parameters](methods.svg)\n"


if __name__ == "__main__":
    main()
