"""Which rows a stage gets: by a hash of the prompt alone, disjoint over stages, the same held-out prompts for all."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pipeline.config.recipe import Recipe
from pipeline.config.recipe import load as reload
from pipeline.data.shape import Example
from pipeline.data.split import check, fingerprints, place, position
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


class Split:
    """What `place` says of all rows of a stage: the examples of both parts, and rows by outcome."""

    def __init__(self, recipe: Recipe, stage: str) -> None:
        placed = list(place(recipe, stage, recipe.path.parent))
        self.train = [row.example for row in placed if row.part == "train" and row.example]
        self.held_out = [row.example for row in placed if row.part == "held_out" and row.example]
        self.outcomes = Counter(row.reason or str(row.part) for row in placed)


def load(recipe: Recipe, stage: str) -> Split:
    return Split(recipe, stage)


def named(examples: list[Example]) -> set[str]:
    return {str(example.prompt) for example in examples}


def prompts(split: Split) -> set[str]:
    return named(split.train)


def held_out(split: Split) -> set[str]:
    return named(split.held_out)


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


def test_every_row_has_one_outcome(tmp_path: Path, make_recipe: Maker) -> None:
    unusable = [{"prompt": "x", "chosen": "same", "rejected": "same"}, {"prompt": "y", "chosen": "", "rejected": "b"}]
    write_rows(tmp_path, PLACES)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in unusable)
    recipe = make_recipe(holdout=0.2)
    skipped = {"chosen equals rejected": 1, "empty reply": 1}
    assert load(recipe, "sft").outcomes == {"train": 2, "held_out": 3, "other stages' share": 3, **skipped}
    assert load(recipe, "reward").outcomes == {"train": 1, "held_out": 3, "other stages' share": 4, **skipped}
    # The prompts of unusable rows are prompts all the same. By sha256sum x is at 0.1775 and held out, y at 0.6327.
    assert load(recipe, "ppo").outcomes == {"train": 2, "held_out": 4, "other stages' share": 4}


def test_rows_of_plain_text_are_placed_by_their_text(tmp_path: Path, make_recipe: Maker) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in PLACES]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    split = load(make_recipe(holdout=0.2), "sft")
    assert ({e.chosen for e in split.train}, {e.chosen for e in split.held_out}) == (SHARES["sft"], HELD_OUT)


def test_one_split_cuts_every_file_alike(tmp_path: Path, make_recipe: Maker) -> None:
    """A prompt that lies in two files is still of one stage: `data.split` of 2, 4, 4 gives the parts of the shares 0.2, 0.4,
    0.4 worked out above, in whichever file."""
    write_rows(tmp_path, PLACES)
    write_rows(tmp_path, PLACES, "more.jsonl")
    both = [{"path": "rows.jsonl"}, {"path": "more.jsonl"}]
    recipe = make_recipe(
        holdout=0.2,
        split={"sft": 2, "reward": 4, "ppo": 4},
        sft={"data": both},
        reward={"data": both},
        ppo={"prompts": both},
    )
    for stage, expected in SHARES.items():
        assert prompts(load(recipe, stage)) == expected
        assert len(load(recipe, stage).train) == 2 * len(expected)


@pytest.mark.parametrize(("split", "word"), [({"stf": 1}, "write `sft`"), ({"sft": 1}, "`share` of its own")])
def test_a_split_that_cannot_be(make_recipe: Maker, split: dict[str, float], word: str) -> None:
    with pytest.raises(UserError, match=word):
        make_recipe(split=split)


def test_a_source_without_a_usable_row_is_refused_before_the_launch(tmp_path: Path, make_recipe: Maker) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "chosen": "same", "rejected": "same"}\n' * 3, encoding="utf-8"
    )
    with pytest.raises(UserError) as raised:
        check(make_recipe(), "reward", tmp_path)
    for word in ("stages.reward.data", "none of the first 3 rows of rows.jsonl", "chosen equals rejected"):
        assert word in str(raised.value)


def test_fingerprint_names_the_path_as_written(tmp_path: Path, make_recipe: Maker) -> None:
    write_rows(tmp_path, PLACES)
    (record,) = fingerprints(make_recipe(), "sft", {})
    assert record["path"] == "rows.jsonl"
    assert len(record["sha256"]) == 64


def test_real_preferences_are_counted_to_the_last_row(hh_rlhf: Path, make_recipe: Maker) -> None:
    recipe = make_recipe(holdout=0.05, path=str(hh_rlhf))
    outcomes = load(recipe, "reward").outcomes
    assert outcomes.total() == 8552
    assert outcomes["chosen equals rejected"] == 36
    assert outcomes["chosen and rejected answer different prompts"] == 17
    assert outcomes["empty reply"] == 11


@pytest.mark.parametrize("root", [".", None])
def test_data_stays_inside_the_root_that_was_allowed(tmp_path: Path, make_recipe: Maker, root: str | None) -> None:
    (tmp_path / "in").mkdir()
    write_rows(tmp_path, PLACES)
    write_rows(tmp_path / "in", PLACES)
    recipe = make_recipe(sft={"data": [{"path": "in/rows.jsonl"}]})
    for path, reads in (("in/rows.jsonl", True), ("rows.jsonl", root is None)):
        allowed = [f"data.root={tmp_path / 'in'}"] if root else []
        one = reload(recipe.path, [*allowed, f"stages.sft.data=[{{path: {path}}}]"])
        if reads:
            assert prompts(load(one, "sft")) == PLACES.keys() - HELD_OUT
            assert fingerprints(one, "sft", {})
        else:
            for use in (lambda: load(one, "sft"), lambda: fingerprints(one, "sft", {})):  # noqa: B023
                with pytest.raises(UserError, match=r"data\.root: .*rows\.jsonl is outside"):
                    use()
