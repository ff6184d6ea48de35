"""What a distillation's block may say, and what its teacher takes of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import memory
from pipeline.config.recipe import load
from pipeline.errors import UserError
from pipeline.memory import Need

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QWEN, OPT = "Qwen/Qwen2.5-0.5B", "facebook/opt-350m"
QWEN_ALL, OPT_ALL = 494_032_768, 331_196_416
DATA = [{"path": "d"}]


def written(folder: Path, change: dict[str, Any], **outer: Any) -> Path:
    """An SFT stage, a reward model, and a student of the former."""
    distill = {"kind": "distill", "teacher": "sft", "data": DATA, "lr": 1e-4, **change}
    stages = {name: {"kind": name, "data": DATA, "lr": 1e-4} for name in ("sft", "reward")}
    path = folder / "r.yaml"
    path.write_text(
        yaml.safe_dump({"name": "m", "base": {"model": OPT}, "stages": {**stages, "distill": distill}, **outer})
    )
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": "sff"}, "teacher.stage"),
        ({"teacher": "reward"}, "is of kind reward"),
        ({"init": "sft"}, "starts as its teacher"),
        ({"teacher": "base"}, "starts as its teacher"),
        ({"teacher": {"stage": "sft", "model": "x"}}, "not both"),
        ({"teacher": {"stage": "sft", "dtype": "bf16"}}, "those of a `model`"),
        ({"beta": 1.5}, "beta"),
        ({"sampling": {"engine": "deepspeed"}}, "depend on the ranks"),
        ({"sampling": {"adapter": "merged"}}, "leave out sampling.adapter"),
    ],
)
def test_recipes_that_cannot_work(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(written(tmp_path, change))


def test_shipped_recipe_is_a_chain() -> None:
    recipe = load("distill")
    assert recipe.order() == ["sft", "reward", "ppo", "distill", "export"]
    assert recipe.parents("distill") == ["ppo"]


def need(folder: Path, change: dict[str, Any], **outer: Any) -> Need:
    return memory.estimate(load(written(folder, change, **outer)), "distill", CONFIGS, "cuda")


def test_teacher_on_the_students_base_is_counted_once(tmp_path: Path) -> None:
    """Of two adapters of rank 16 on OPT-350M one trains; full fine-tuning moves the base, so that the teacher has its own."""
    shared = need(tmp_path, {})
    assert shared.parameters == OPT_ALL
    assert shared.phases["backward"].weights == 2 * OPT_ALL
    assert shared.phases["backward"].adapters == pytest.approx(2 * 2 * shared.trained)
    whole = need(tmp_path, {"adapter": {"method": "full"}})
    assert (whole.parameters, whole.trained) == (2 * OPT_ALL, OPT_ALL)


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_another_teacher_is_whole_on_every_rank(tmp_path: Path, config: str) -> None:
    """In bf16: the student's weights over two ranks under ZeRO-3, the teacher's not."""
    found = need(tmp_path, {"teacher": {"model": QWEN}}, deepspeed={"config": config, "num_gpus": 2})
    assert found.parameters == OPT_ALL + QWEN_ALL
    own = 2 * OPT_ALL / (2 if config == "zero3" else 1)
    assert found.phases["backward"].weights == pytest.approx(own + 2 * QWEN_ALL)


def test_replies_need_a_cache_and_an_expectation_needs_logits(tmp_path: Path) -> None:
    """Both models' logits of a chunk: 2^24 elements; in bf16 each twice, in float32 six tensors for a KL."""
    assert "rollout" in need(tmp_path, {"lmbda": 0.5}).phases
    found = need(tmp_path, {"lmbda": 0.0, "beta": 0.0, "batch": 16, "max_length": 512})
    assert "rollout" not in found.phases
    tokens = 2**24 // 50272
    assert found.phases["backward"].logits == tokens * 50272 * (2 * 2 + 6 * 4)
