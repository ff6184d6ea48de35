"""One real browser for all pages; where there is none, its tests are skipped and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Seen:
    """A page, and whatever it complained of or asked the network for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = os.environ.get("RELAY_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium; install Debian's, or set RELAY_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Seen]]:
    """`look(address, width=1280, dark=False)`: the page there, with its errors and requests."""
    contexts = []

    def open_page(address: str, width: int = 1280, dark: bool = False) -> Seen:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
        )
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.set_default_timeout(15_000)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("console", lambda m: seen.errors.append(m.text) if m.type in ("error", "warning") else None)
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.goto(address)
        return seen

    yield open_page
    for context in contexts:
        context.close()
