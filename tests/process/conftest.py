"""A browser for the pages that a run leaves. Tests skip, with the reason, where it cannot be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import DESKTOP, Opened, chromium, drawn


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """Opens pages. At the end of the test no page has logged an error, and none has asked for anything but itself."""
    contexts, errors, asked = [], [], []

    def open_page(file: Path, fragment: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**({"viewport": DESKTOP} | options)))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri() + fragment)
        drawn(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert {url.partition("#")[0].partition(":")[0] for url in asked} <= {"file", "data", "blob"}
    assert len({url.partition("#")[0] for url in asked if url.startswith("file")}) <= 1
