"""The report: one file, all of it data but for our own code; looked at and used in a real browser."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from pipeline.report.page import embedded, report
from tests.report.conftest import Seen
from tests.support import runs

Look = Callable[..., Seen]
HOSTILE = '</script><img src=x onerror="document.title=1"><!-- <script>document.title=1</script> \u2028 &lt;'


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of the report of a finished run, of a failed one, and of two beside each other."""
    folder = tmp_path_factory.mktemp("pages")
    first = runs.run(folder / "first", text=HOSTILE)
    second = runs.run(folder / "second", seed=3, until="ppo")
    made = {
        "finished": report([first]),
        "failed": report([second]),
        "both": report([first, second], folder / "both.html"),
    }
    return {name: path.as_uri() for name, path in made.items()}


@pytest.mark.fast
def test_data_cannot_end_its_element() -> None:
    text = embedded({"reply": HOSTILE, "loss": float("nan")})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"reply": HOSTILE, "loss": None}


@pytest.mark.fast
def test_the_command(tmp_path: Path) -> None:
    """By a run's folder, by several, and of one that is not there."""
    runs.run(tmp_path / "a", steps=3)
    relay = [sys.executable, "-m", "pipeline.cli", "report"]
    done = subprocess.run([*relay, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert str(tmp_path / "a" / "report.html") in done.stdout
    refused = subprocess.run([*relay, str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert str(tmp_path / "b") in refused.stderr
    (tmp_path / "b").mkdir()
    empty = subprocess.run([*relay, str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert empty.returncode == 2
    assert "no run in" in empty.stderr


def test_a_finished_run(look: Look, pages: dict[str, str]) -> None:
    seen = look(pages["finished"])
    page = seen.page
    assert page.title() == "quickstart - Relay"
    assert page.locator(".chain .node b").all_inner_texts() == ["sft", "reward", "ppo", "evaluate"]
    assert page.locator(".chain > svg > path").count() == 5, "sft and reward to ppo, all three to evaluate"
    for words in ("win rate", "0.75 (0.65 to 0.85)", "lost", "device-hours", "bbbbbbbbbbbb", "rows.jsonl", "kind: ppo"):
        assert words in page.locator("main").inner_text(), words
    titles = page.locator("figure h4").all_inner_texts()
    for title in ("Reward", "KL to the reference", "Reply length", "Entropy", "Clip fraction", "Reward against KL"):
        assert title in titles
    assert "Seconds of a step by phase" in titles
    assert any(title.startswith("Calibration") for title in titles)
    page.locator("#stage-ppo figure").first.scroll_into_view_if_needed()
    page.wait_for_selector("#stage-ppo figure .plot svg.main-svg")
    label = page.locator("#stage-ppo figure .plot").nth(1).get_attribute("aria-label")
    assert label == "KL to the reference. rollouts: 30 points, from 0.05 to 1.5, least 0.05, greatest 1.5."
    assert seen.errors == []
    assert [request for request in seen.requests if not request.startswith(("file:", "data:", "blob:"))] == []


def test_text_of_a_run_stays_text(look: Look, pages: dict[str, str]) -> None:
    page = look(pages["finished"]).page
    assert page.locator("img").count() == 0
    assert page.locator("#stage-evaluate .samples td.text").nth(2).inner_text() == HOSTILE
    assert page.title() == "quickstart - Relay"


def test_samples_are_searched_filtered_and_sorted(look: Look, pages: dict[str, str]) -> None:
    page = look(pages["finished"]).page
    samples = page.locator("#stage-ppo .samples")
    prompts = samples.locator("tbody td:first-child")
    assert prompts.all_inner_texts() == ["Question 10?", "Question 20?", "Question 30?"]
    samples.locator("input[type=search]").fill("QUESTION 2")
    assert prompts.all_inner_texts() == ["Question 20?"]
    assert samples.locator("mark").first.inner_text() == "Question 2"
    assert samples.locator("[role=status]").inner_text() == "1 of 3"
    samples.locator("input[type=search]").fill("")
    samples.get_by_label("Step").select_option("30")
    assert prompts.all_inner_texts() == ["Question 30?"]
    samples.get_by_label("Step").select_option("")
    samples.get_by_label("Order").select_option("-score")
    assert prompts.all_inner_texts() == ["Question 30?", "Question 20?", "Question 10?"]


def test_a_chart_is_a_table_too(look: Look, pages: dict[str, str]) -> None:
    page = look(pages["finished"]).page
    figure = page.locator("#stage-ppo figure").nth(1)
    figure.locator("summary").click()
    assert figure.locator("tbody tr").count() == 30
    assert figure.locator("tbody tr").nth(9).locator("td").all_inner_texts() == ["rollouts", "10", "0.5"]


def test_a_failed_run_says_why(look: Look, pages: dict[str, str]) -> None:
    seen = look(pages["failed"])
    assert "the reward source gave no number for row 7" in seen.page.locator("#stage-ppo .error").inner_text()
    assert "step 15: replies grow longer" in seen.page.locator("#stage-ppo .warnings").inner_text()
    assert seen.page.locator("#node-evaluate .state").inner_text() == "○ not run"
    assert seen.errors == []


def test_two_runs_beside_each_other(look: Look, pages: dict[str, str]) -> None:
    seen = look(pages["both"])
    page = seen.page
    figure = page.locator("figure", has_text="ppo: objective/scores")
    figure.scroll_into_view_if_needed()
    figure.locator("svg.main-svg").first.wait_for()
    dashes = figure.locator(".scatterlayer path.js-line").evaluate_all("all => all.map(e => e.style.strokeDasharray)")
    assert len(dashes) == 2
    assert dashes[0] != dashes[1], "colour is not the only sign"
    differing = page.get_by_role("region", name="Keys that differ").locator("tbody tr")
    assert [row.locator("td").all_inner_texts() for row in differing.all()] == [["seed", "0", "3"]]
    numbers = page.get_by_role("region", name="Final numbers of each run").locator("tbody tr").first
    assert numbers.locator("td").all_inner_texts() == ["sft", "held_out/loss", "0.5", "3.5"]
    assert seen.errors == []


@pytest.mark.parametrize("which", ["finished", "failed", "both"])
def test_a_phone_has_room(look: Look, pages: dict[str, str], which: str) -> None:
    page = look(pages[which], width=375).page
    assert page.evaluate("document.documentElement.scrollWidth") == 375


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_anyone_can_read_it(look: Look, pages: dict[str, str], dark: bool) -> None:
    page = look(pages["finished"], dark=dark).page
    found = Axe().run(page).response["violations"]
    told = [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")]
    assert told == []


def test_dark_and_light(look: Look, pages: dict[str, str]) -> None:
    page = look(pages["finished"], dark=True).page
    ground: Callable[[], Any] = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    dark = ground()
    page.locator("#theme").click()
    assert ground() != dark
    assert page.locator("#theme").get_attribute("aria-pressed") == "false"


def test_by_keyboard(look: Look, pages: dict[str, str]) -> None:
    page = look(pages["finished"]).page
    focused: Callable[[str], Any] = lambda what: page.evaluate(f"document.activeElement.{what}")  # noqa: E731
    page.keyboard.press("Tab")
    assert focused("textContent") == "Skip to the content"
    page.keyboard.press("Tab")
    assert focused("id") == "theme"
    page.keyboard.press("Tab")
    assert focused("id") == "node-sft"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("Math.abs(document.getElementById('stage-ppo').getBoundingClientRect().top) < 120")
