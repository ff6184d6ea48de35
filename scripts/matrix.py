"""Run SFT, reward model and PPO for every fine-tuning method x ZeRO {0, 1, 2, 3} x {1, 2 ranks} on a tiny model.

Every output is opened by the next stage and by plain transformers and PEFT. Writes docs/results/matrix.md.

    python scripts/matrix.py
    python scripts/matrix.py --ranks 1 --methods lora qlora full --out FILE       # some of it, elsewhere
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.config.methods import METHODS  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.methods import changes  # noqa: E402
from tests.support.session import Ranks  # noqa: E402

OUT = ROOT / "docs" / "results" / "matrix.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    rows, failures = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny.model(folder / "llama")
        for world in arguments.ranks:
            ranks = Ranks(world, folder / f"ranks{world}")
            for method, zero in itertools.product(arguments.methods, range(4)):
                if zero == 3 and not METHODS[method].zero3:
                    rows.append(f"| {method} | {zero} | {world} | refused by the recipe check | | | |")
                    continue
                if not ranks.alive:
                    ranks = Ranks(world, folder / f"ranks{world}-{method}{zero}")
                place = folder / f"{method}-{zero}-{world}"
                place.mkdir()
                recipe = str(tiny.recipe(place / "r.yaml", base, **changes(method, zero)))
                began = time.monotonic()
                try:
                    hashes = ranks.call("tests.support.stages:chain", recipe=recipe, run_dir=str(place / "run"))[0]
                    seconds = time.monotonic() - began
                    differences = ranks.call(
                        "tests.distributed.cases:opens_plainly", recipe=recipe, run_dir=str(place / "run")
                    )[0]
                    good = max(differences.values()) <= (0.05 if method == "qlora" else 2e-5)
                    outcome = "passed" if good else "opens differently"
                    worst = f"{max(differences.values()):.1e}"
                    published = ", ".join(f"{stage} {value[:8]}" for stage, value in hashes.items())
                except AssertionError as error:
                    good, outcome, worst, published, seconds = False, str(error).splitlines()[-1], "", "", 0.0
                failures += not good
                rows.append(f"| {method} | {zero} | {world} | {outcome} | {worst} | {seconds:.1f} | {published} |")
                print(rows[-1], flush=True)
            ranks.close()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(rows), encoding="utf-8")
    sys.exit(1 if failures else 0)


def page(rows: list[str]) -> str:
    head = """# The matrix: method x ZeRO stage x ranks

`python scripts/matrix.py`: SFT and reward model, two steps each, and a step of PPO on a random two-layer Llama (64 wide,
float32; QLoRA: nf4 under bf16), CPU ranks over gloo. AdaLoRA takes four steps and two epochs, to have some to prune in;
PiSSA, which PPO refuses, is followed by LoRA there. *Difference* is the largest one between Relay's reading of the three
outputs and `PeftModel.from_pretrained` / `AutoModel…from_pretrained` reading them (log-probabilities of a text, score of a
text); allowed are 2e-5 in float32 and 0.05 in bf16. *Seconds* are for the three stages in warm processes; the first case of
each number of ranks also pays for importing the stack.

| method | ZeRO | ranks | outcome | difference | seconds | published (content hash) |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
