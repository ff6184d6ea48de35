"""Run SFT, reward model and PPO for all of {LoRA, QLoRA, full} x ZeRO {0, 1, 2, 3} x {1, 2 ranks} on a tiny model.

Every output is opened by the next stage and by plain transformers and PEFT. Writes docs/results/matrix.md.

    python scripts/matrix.py
    python scripts/matrix.py --ranks 1 --out FILE       # on one rank alone, elsewhere
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

from tests.distributed.test_matrix import METHODS, TOLERANCE  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.session import Ranks  # noqa: E402

OUT = ROOT / "docs" / "results" / "matrix.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    rows, failures = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny.model(folder / "llama")
        for world in arguments.ranks:
            ranks = Ranks(world, folder / f"ranks{world}")
            for method, zero in itertools.product(METHODS, range(4)):
                if not ranks.alive:
                    ranks = Ranks(world, folder / f"ranks{world}-{method}{zero}")
                place = folder / f"{method}-{zero}-{world}"
                place.mkdir()
                recipe = str(tiny.recipe(place / "r.yaml", base, deepspeed__config=f"zero{zero}", **METHODS[method]))
                began = time.monotonic()
                try:
                    hashes = ranks.call("tests.support.stages:chain", recipe=recipe, run_dir=str(place / "run"))[0]
                    seconds = time.monotonic() - began
                    differences = ranks.call(
                        "tests.distributed.cases:opens_plainly", recipe=recipe, run_dir=str(place / "run")
                    )[0]
                    good = max(differences.values()) <= TOLERANCE[method]
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

`python scripts/matrix.py`: SFT, reward model and PPO, four steps each, on a random two-layer Llama (64 wide, float32; QLoRA:
nf4 under bf16), CPU ranks over gloo. *Difference* is the largest one between Relay's reading of the three outputs and plain
`PeftModel.from_pretrained` / `AutoModel…from_pretrained` reading them (log-probabilities of a text, score of a text); allowed
are 2e-5 in float32 and 0.05 in bf16. *Seconds* are for the three stages in warm processes; the first case of each number of
ranks also pays for importing the stack.

| method | ZeRO | ranks | outcome | difference | seconds | published (content hash) |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
