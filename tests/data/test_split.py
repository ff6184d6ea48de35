"""Which rows a stage gets: by a hash of the prompt alone, disjoint over stages, the same held-out prompts for all."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pipeline.config.recipe import Recipe
from pipeline.data.split import Split, fingerprints, load, position
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

Maker = Callable[..., Recipe]

# The first 8 bytes of `printf a | sha256sum` and so on, as a share of 2^64 (four digits).
PLACES = {"a": 0.7914, "b": 0.2427, "c": 0.1816, "d": 0.0964, "e": 0.2480, "f": 0.1452, "g": 0.8009, "h": 0.6666}
# With holdout 0.2 the places below 0.2 are held out; (place - 0.2) / 0.8 is then
# b 0.053, e 0.060 (below 0.2: sft), h 0.583 (below 0.6: reward), a 0.739, g 0.751 (ppo).
HELD_OUT = {"c", "d", "f"}
SHARES = {"sft": {"b", "e"}, "reward": {"h"}, "ppo": {"a", "g"}}


def write_rows(folder: Path, prompts: Iterable[str], name: str = "rows.jsonl") -> None:
    lines = [json.dumps({"prompt": prompt, "chosen": "good", "rejected": "bad"}) for prompt in prompts]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def prompts(split: Split) -> set[str]:
    return {str(example.prompt) for example in split.train}


def held_out(split: Split) -> set[str]:
    return {str(example.prompt) for example in split.held_out}


@pytest.mark.parametrize(("prompt", "place"), PLACES.items())
def test_place_of_a_prompt_by_sha256sum(prompt: str, place: float) -> None:
    assert position(prompt) == pytest.approx(place, abs=5e-5)


def test_place_of_text_that_is_no_unicode() -> None:
    assert 0.0 <= position("\ud800 lone surrogate") < 1.0


def test_stages_get_the_shares_worked_out_by_hand(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    recipe = make_recipe(holdout=0.2)
    for stage, expected in SHARES.items():
        assert prompts(load(recipe, stage)) == expected


def test_every_stage_holds_out_the_same_prompts(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    recipe = make_recipe(holdout=0.2)
    assert [held_out(load(recipe, stage)) for stage in recipe.stages] == [HELD_OUT] * 4


def test_shares_of_many_prompts_are_disjoint_and_whole(tmp_path: Path, make_recipe: Maker) -> None:
    everything = {f"prompt {n}" for n in range(1000)}
    write_rows(tmp_path, sorted(everything))
    recipe = make_recipe(holdout=0.1)
    parts = [prompts(load(recipe, stage)) for stage in ("sft", "reward", "ppo")]
    parts.append(held_out(load(recipe, "evaluate")))
    assert sum(map(len, parts)) == 1000
    assert set().union(*parts) == everything
    # Shares of 900: 180, 360, 360, and 100 held out; a binomial's three standard deviations are below 46.
    for part, expected in zip(parts, (180, 360, 360, 100), strict=True):
        assert abs(len(part) - expected) < 46


def test_order_of_rows_and_rows_added_change_nothing_for_the_others(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, reversed([*PLACES, "another", "and another"]))
    recipe = make_recipe(holdout=0.2)
    for stage, expected in SHARES.items():
        split = load(recipe, stage)
        assert prompts(split) & PLACES.keys() == expected
        assert held_out(split) & PLACES.keys() == HELD_OUT


def test_seed_does_not_move_the_split(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    recipe = make_recipe(holdout=0.2, sft={"seed": 7})
    assert prompts(load(recipe, "sft")) == SHARES["sft"]


def test_rows_of_one_prompt_stay_together(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, ["a", "b", "h", "a", "b", "a", "d", "d"])
    recipe = make_recipe(holdout=0.2)
    assert [len(load(recipe, stage).train) for stage in ("sft", "reward", "ppo")] == [2, 1, 3]
    assert [len(load(recipe, stage).held_out) for stage in recipe.stages] == [2, 2, 2, 2]


def test_no_share_means_all_but_the_held_out_prompts(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    recipe = make_recipe(holdout=0.2, sft={"data": [{"path": "rows.jsonl"}]})
    assert prompts(load(recipe, "sft")) == PLACES.keys() - HELD_OUT
    # The shares of the others then start at 0: reward takes [0, 0.4), ppo [0.4, 0.8).
    assert [prompts(load(recipe, stage)) for stage in ("reward", "ppo")] == [{"b", "e"}, {"a", "g", "h"}]


def test_each_path_is_cut_on_its_own(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    write_rows(tmp_path, PLACES, "more.jsonl")
    recipe = make_recipe(holdout=0.2, sft={"data": [{"path": "more.jsonl", "share": 0.6}]})
    assert prompts(load(recipe, "sft")) == {"b", "e", "h"}  # [0, 0.6) of more.jsonl
    assert prompts(load(recipe, "reward")) == {"b", "e"}  # [0, 0.4) of rows.jsonl


def test_two_sources_of_one_path_take_shares_one_after_the_other(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    both = [{"path": "rows.jsonl", "share": 0.2}, {"path": "rows.jsonl", "share": 0.4, "take": "rejected"}]
    recipe = make_recipe(
        holdout=0.2,
        sft={"data": both},
        reward={"data": [{"path": "rows.jsonl", "share": 0.2}]},
        ppo={"prompts": [{"path": "rows.jsonl", "share": 0.2}]},
    )
    assert [(e.prompt, e.chosen) for e in load(recipe, "sft").train] == [("b", "good"), ("e", "good"), ("h", "bad")]
    assert prompts(load(recipe, "reward")) == {"a", "g"}


def test_holdout_of_nothing(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    split = load(make_recipe(holdout=0.0, sft={"data": [{"path": "rows.jsonl"}]}), "sft")
    assert (prompts(split), split.held_out) == (set(PLACES), [])


def test_every_row_is_counted_once(tmp_path: Path, make_recipe: Maker) -> None:
    unusable = [{"prompt": "x", "chosen": "same", "rejected": "same"}, {"prompt": "y", "chosen": "", "rejected": "b"}]
    write_rows(tmp_path, PLACES)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in unusable)
    recipe = make_recipe(holdout=0.2, ppo={"prompts": [{"path": "rows.jsonl", "share": 0.4, "limit": 1}]})
    counts = {stage: dict(load(recipe, stage).counts["rows.jsonl"]) for stage in ("sft", "reward", "ppo")}
    skipped = {"chosen equals rejected": 1, "empty reply": 1}
    assert counts["sft"] == {"rows": 10, "used": 2, "held out": 3, "other stages' share": 3, **skipped}
    assert counts["reward"] == {"rows": 10, "used": 1, "held out": 3, "other stages' share": 4, **skipped}
    # The prompts of unusable rows are prompts all the same. By sha256sum x is at 0.1775 and held out, y at 0.6327.
    assert counts["ppo"] == {"rows": 10, "used": 1, "over the limit": 1, "held out": 4, "other stages' share": 4}
    for reasons in counts.values():
        assert sum(reasons.values()) == 2 * reasons["rows"]


def test_stage_without_a_row_is_refused(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, sorted(HELD_OUT))
    with pytest.raises(UserError) as raised:
        load(make_recipe(holdout=0.2), "sft")
    for word in ("recipe recipe.yaml: stages.sft", "no training row is left", "'held out': 3", "raise the share"):
        assert word in str(raised.value)


def test_bad_row_stops_the_stage_with_its_file_and_number(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, ["a", "b"])
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "c"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, row 3: fields found: prompt"):
        load(make_recipe(), "reward")


def test_fingerprint_names_the_path_as_written(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    (record,) = fingerprints(make_recipe(), "sft")
    assert record["path"] == "rows.jsonl"
    assert len(record["sha256"]) == 64


def test_real_preferences_are_counted_to_the_last_row(hh_rlhf: Path, make_recipe: Maker) -> None:
    recipe = make_recipe(holdout=0.05, path=str(hh_rlhf))
    counts = load(recipe, "reward").counts[str(hh_rlhf)]
    assert counts["rows"] == 8552
    assert counts["chosen equals rejected"] == 36
    assert counts["chosen and rejected answer different prompts"] == 17
    assert counts["empty reply"] == 11
    assert sum(counts.values()) == 2 * 8552
