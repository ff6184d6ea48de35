"""The shipped recipes load and plan; models are counted exactly; reading a recipe takes neither torch nor long."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import memory
from pipeline.config.kinds import KINDS
from pipeline.config.recipe import load
from pipeline.config.schema import Ppo

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "configs"
SHIPPED = sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))
TESTED = sorted((ROOT / "tests" / "recipes").glob("*.yaml"))

# Parameters as published with the models; `other` is worked out by hand from the published hyper-parameters.
PUBLISHED = {
    # 50272 and 2050 embeddings of 2048; 24 x (18432 biases + 8192 in two norms); the final norm.
    "facebook/opt-1.3b": (1_315_758_080, 107_798_528),
    # 50272 embeddings of 512 and 2050 of 1024; 24 x (9216 biases + 4096 in two norms); no final norm.
    "facebook/opt-350m": (331_196_416, 28_157_952),
    # 151936 embeddings of 896, tied; 24 x (1152 biases of q, k and v + 1792 in two norms); the final norm.
    "Qwen/Qwen2.5-0.5B": (494_032_768, 136_206_208),
    # 128256 embeddings of 4096, twice; 32 x 8192 in two norms; the final norm.
    "meta-llama/Meta-Llama-3-8B": (8_030_261_248, 1_050_939_392),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_the_published_ones(model: str) -> None:
    shape = memory.shape(memory.read(model, model, CONFIGS), model)
    assert (shape.parameters, shape.other) == PUBLISHED[model]


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem.startswith(("quickstart", "hh_"))], ids=lambda p: p.stem)
def test_shipped_recipe_is_found_by_name_and_chains_the_three_stages(path: Path) -> None:
    recipe = load(path.stem)
    assert recipe.path == path
    kinds = [recipe.stages[stage].kind for stage in recipe.order()]
    assert [kinds.index(kind) for kind in ("sft", "reward", "ppo", "evaluate")] == [0, 1, 2, 3]


@pytest.mark.parametrize("path", TESTED, ids=lambda p: p.stem)
def test_recipe_of_the_tests_loads(path: Path) -> None:
    recipe = load(path)
    assert recipe.order()[-1] == "evaluate"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_plan_shows_every_stage_its_model_and_its_command(path: Path) -> None:
    recipe = load(path)
    done = relay("plan", path.stem, "--configs", str(CONFIGS), "--device-memory", "80")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("--stage ") == len(recipe.stages)
    models = {stage: block for stage, block in recipe.stages.items() if KINDS[block.kind].model}
    for stage, block in models.items():
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"{stage} ({block.kind})"))
        assert block.base.model in row
        assert f"--stage {stage} " in done.stdout
        if stage == "sft" and block.base.model in PUBLISHED:
            assert f"{PUBLISHED[block.base.model][0] / 1e6:,.1f} M" in row
    assert done.stdout.count("headroom") == len(models)
    assert "of 80.00 (a GPU of 80 GiB)" in done.stdout


def test_plan_refuses_what_does_not_fit_and_names_the_change_that_does() -> None:
    """Llama-3-8B in 4 bits takes 5.3 GiB of weights: in 6 GiB there is no room for 8 rows of activations."""
    done = relay("plan", "hh_llama3_8b_qlora", "--configs", str(CONFIGS), "--device-memory", "6")
    assert done.returncode == 2
    assert "stages.sft: needs" in done.stderr
    assert "expected at most 6.00 GiB: a GPU of 6 GiB" in done.stderr
    fix = next(line for line in done.stderr.splitlines() if "fix: --set" in line)
    assert "stages.sft.gradient_checkpointing=true" in fix or "stages.sft.deepspeed.config=zero3" in fix


def test_hh_stages_have_disjoint_shares_and_evaluate_takes_none() -> None:
    for path in (p for p in SHIPPED if p.stem.startswith("hh_")):
        recipe = load(path)
        taken = [
            recipe.interval(stage, source)
            for stage in ("sft", "reward", "ppo")
            for source in getattr(recipe.stages[stage], "prompts" if stage == "ppo" else "data")
        ]
        assert taken == [pytest.approx((0.0, 0.2)), pytest.approx((0.2, 0.6)), pytest.approx((0.6, 1.0))]


def test_opt_recipe_has_deepspeed_chats_constants() -> None:
    ppo = load("hh_opt_1.3b").stages["ppo"]
    assert isinstance(ppo, Ppo)
    assert (ppo.lr, ppo.critic.lr, ppo.warmup, ppo.betas) == (9.65e-6, 5e-6, 100, (0.9, 0.95))
    assert (ppo.kl.coef, ppo.score_clip, ppo.clip, ppo.value_clip) == (0.1, 5.0, 0.2, 0.2)
    assert (ppo.gamma, ppo.lam, ppo.whiten) == (1.0, 0.95, False)
    assert (ppo.sampling.max_prompt_length, ppo.sampling.max_response_length) == (256, 256)


@pytest.mark.alone
def test_reading_a_recipe_imports_no_torch_and_takes_under_two_seconds() -> None:
    code = (
        "import sys; import pipeline.cli; from pipeline.config.recipe import load; load('quickstart'); "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    seconds = []
    for _ in range(2):  # the better of two, because other work may hold the processor
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(time.monotonic() - began)
        assert done.stdout.strip() == "[]"
    assert min(seconds) < 2.0


def relay(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a terminal wide enough for its tables."""
    env = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=env,
    )
