"""A table's page in a browser: it sorts by a click, and fits."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import DESKTOP, PHONE, Opened

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "analysis"))  # explored_runs.py

from explored_runs import whole_run
from written_trials import results

from semgap.analysis.tables.make_tables import make_tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    make_tables(results(root, *whole_run()), root / "tables")
    return root / "tables"


def column(page: Any, heading: str) -> list[str]:
    """The texts of a column of the first table that has it."""
    headings = [text.strip() for text in page.locator("table").first.locator("thead th").all_inner_texts()]
    return list(page.locator(f"table >> nth=0 >> tbody tr td:nth-child({headings.index(heading) + 1})").all_inner_texts())


def test_a_click_on_a_heading_sorts_by_value_and_a_second_one_the_other_way(tables: Path, opened: Opened) -> None:
    page = opened(tables / "summary.html")
    before = column(page, "mean (ms)")
    values = [float(re.sub(r" \[.*", "", text).replace(",", "")) for text in before]
    assert len(set(values)) > 2 and any("[" in text for text in before)
    heading = page.locator("thead th", has_text="mean (ms)").first
    heading.click()
    page.wait_for_selector("thead th[aria-sort=ascending]", timeout=5000)
    assert column(page, "mean (ms)") == [before[values.index(value)] for value in sorted(values)]
    heading.click()
    page.wait_for_selector("thead th[aria-sort=descending]", timeout=5000)
    assert column(page, "mean (ms)") == [before[values.index(value)] for value in sorted(values, reverse=True)]


def test_a_heading_sorts_by_the_keyboard_and_only_its_own_table(tables: Path, opened: Opened) -> None:
    page = opened(tables / "ladder.html")
    first, second = page.locator("table").nth(0), page.locator("table").nth(1)
    kept = second.inner_text()
    first.locator("thead th").first.locator("[role=button]").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("thead th[aria-sort=ascending]", timeout=5000)
    modes = first.locator("tbody tr td:first-child").all_inner_texts()
    assert len(modes) > 2 and modes == sorted(modes)
    assert second.inner_text() == kept


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE)], ids=("light", "dark", "phone"))
def test_every_page_fits_the_window_in_light_and_dark_and_on_a_phone(
    tables: Path, opened: Opened, scheme: str, size: dict[str, int], tmp_path: Path
) -> None:
    page = opened(tables / "gap.html", viewport=size, color_scheme=scheme)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    colours = page.evaluate("[...['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])]")
    text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text > back) == (scheme == "dark")


def test_without_javascript_the_page_has_the_same_tables(tables: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tables / "gap.html").as_uri())
    assert page.locator("table").count() > 3
    assert page.locator("table tbody tr").first.is_visible()
    context.close()
