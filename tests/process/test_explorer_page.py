"""The explorer in a browser: Debian's chromium, headless. Skips, with the reason, where it cannot be had."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python import sync_playwright as axe
from pages import DESKTOP, NARROW, PHONE, Opened, drawn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "analysis"))  # explored_runs.py

from explored_runs import poor_run, whole_run, wide_run
from written_trials import Pressed, pressed, results, results_of, written

from semgap import cli
from semgap.analysis.collect_trials import with_directories
from semgap.analysis.explorer.make_explorer import make_explorer
from semgap.analysis.explorer.prices import RATES, RTTS_MS
from semgap.analysis.explorer.views import MEASURED
from semgap.analysis.results import load_recorded, recorded_cells
from semgap.analysis.tables import network
from semgap.analysis.tables.render import cell_text

RTTS = tuple(f"{rtt_ms:g}ms" for rtt_ms in RTTS_MS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a finished run, with its explorer."""
    root = tmp_path_factory.mktemp("run") / "results"
    found = results_of(written(root / "trials", *whole_run()))
    trials = [str(manifest.parent) for manifest in root.rglob("manifest.json")]
    with_directories(found.rows, trials, root).to_csv(root / "results.csv", index=False)
    make_explorer(found, root / "explorer.html")
    return root


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    make_explorer(results(root / "trials", *wide_run()), root / "explorer.html")
    return root / "explorer.html"


def move(page: Any, slider: str, steps: int) -> None:
    """Moves a slider from its left end by keys alone."""
    page.focus(f"#{slider}")
    page.keyboard.press("Home")
    for _ in range(steps):
        page.keyboard.press("ArrowRight")
    drawn(page)


def cells(page: Any, table: str) -> dict[str, list[str]]:
    """The texts of a table by the first of each row, without the numbers of notes and the marks of measured rows."""
    rows = page.locator(f"#{table} tbody tr").all()
    texts = [[re.sub(r" \(\d+\)$", "", text.replace("\u00a0", " ")) for text in row.locator("th, td").all_inner_texts()] for row in rows]
    return {mode: rest for mode, *rest in texts}


def printed(run: Path, capsys: pytest.CaptureFixture[str], phase: str, *arguments: str) -> dict[str, list[str]]:
    """The rows that `semgap price` prints for a phase."""
    assert cli.main(["price", str(run), "--as-recorded", *arguments]) == 0
    blocks = [block for block in capsys.readouterr().out.split("### ") if f"phase {phase}," in block]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("| ")]
    rows = [[re.sub(r" \(\d+\)$", "", text.strip()) for text in line.strip("|").split("|")] for line in lines]
    return {mode: rest for mode, *rest in rows if mode != "mode" and not mode.startswith("---")}


@pytest.mark.parametrize(("rtt", "rate"), [("0.05ms", "10Mbit"), ("30ms", "300Mbit"), ("200ms", "400Gbit")])
def test_sliders_move_by_keys_and_the_figures_are_those_of_semgap_price(
    run: Path, opened: Opened, capsys: pytest.CaptureFixture[str], rtt: str, rate: str
) -> None:
    page = opened(run / "explorer.html")
    move(page, "rtt", RTTS.index(rtt))
    move(page, "rate", RATES.index(rate))
    shown = cells(page, "priced")
    assert len(shown) == 4
    assert shown == printed(run, capsys, "decode", "--rtt", rtt, "--rate", rate)
    assert page.inner_text("#command") == f"semgap price {run}/ --rtt {rtt} --rate {rate}"
    assert page.get_attribute("#rtt", "aria-valuetext") == rtt.replace("ms", " ms")


def test_phase_and_window_are_chosen_and_the_figures_are_those_of_semgap_price(
    run: Path, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    page = opened(run / "explorer.html")
    page.select_option("#window", "32")
    drawn(page)
    link = ("--rtt", "20ms", "--rate", "200Mbit")
    assert page.inner_text("#command").endswith("--window 32")
    assert cells(page, "priced") == printed(run, capsys, "decode", *link, "--window", "32")
    page.select_option("#phase", "prefill")
    drawn(page)
    assert page.is_disabled("#window")
    assert cells(page, "priced") == printed(run, capsys, "prefill", *link)
    assert page.inner_text("#itl-off") == "Nothing to show: no ITL in this phase."


def test_the_answer_is_a_sentence_that_is_read_out(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    answer, parts = page.inner_text("#answer"), cells(page, "parts")
    gap = {mode: row[5] for mode, row in parts.items()}
    assert answer.startswith(
        f"Over 20 ms and 200 Mbit the distance costs a token {gap['remote_cache']} ms with remote_cache and {gap['sys']} ms with sys; "
        "locally it takes 6.0"
    )
    above = f"{float(parts['sys'][6]) - 1:.1%}"
    assert answer.endswith(f"No mode of the ladder comes within 5% of its own compute; the nearest is sys, {above} above it.")
    assert page.get_attribute("#answer", "aria-live") == "polite"
    move(page, "rtt", 0)
    assert "The cheapest knowledge within 5% of its own compute: know_consumer (the client only samples)." in page.inner_text("#answer")


def test_the_address_holds_the_state_and_restores_it(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    page.select_option("#window", "64")
    move(page, "rtt", 3)
    move(page, "rate", 9)
    fragment = page.evaluate("location.hash")
    assert fragment == f"#model=smollm2&phase=decode&window=64&rtt={RTTS[3]}&rate={RATES[9]}"
    other = opened(run / "explorer.html", fragment)
    assert cells(other, "priced") == cells(page, "priced")
    assert (other.input_value("#window"), other.input_value("#rtt"), other.input_value("#rate")) == ("64", "3", "9")
    other.evaluate("location.hash = '#rtt=5ms'")
    other.wait_for_function("document.getElementById('rtt').value === '12'")
    assert not other.is_visible("#moved")


def test_an_address_with_what_the_page_lacks_says_so_and_shows_something_else(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html", "#rtt=25ms&rate=200Mbit&phase=nothing")
    assert page.inner_text("#moved") == "This page does not have phase nothing (shown: decode), rtt 25ms (shown: 20ms)."


@pytest.mark.parametrize("nothing", ["NaN", "null", "undefined", "-1", "1e999", "%00"])
def test_no_address_brings_nan_or_null_to_a_slider(run: Path, opened: Opened, nothing: str) -> None:
    page = opened(run / "explorer.html", f"#rtt={nothing}&rate={nothing}&window={nothing}&model={nothing}&phase={nothing}")
    assert (page.input_value("#rtt"), page.input_value("#rate")) == (str(RTTS.index("20ms")), str(RATES.index("200Mbit")))
    assert page.inner_text("#rtt-text") == "20 ms" and page.inner_text("#moved").count("(shown: ") == 5
    assert not re.search(r"NaN|undefined|Infinity", page.inner_text("main").replace(page.inner_text("#moved"), ""))


def test_the_csv_has_what_is_shown(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html", "#rtt=10ms&rate=1Gbit&window=16")
    with page.expect_download() as download:
        page.click("#csv")
    assert download.value.suggested_filename == "semgap-decode-10ms-1Gbit.csv"
    rows = {row["mode"]: row for row in csv.DictReader(io.StringIO(Path(download.value.path()).read_text()))}
    shown = cells(page, "priced")
    assert set(rows) == set(shown)
    assert {mode: row["kind"] for mode, row in rows.items()} == {mode: "measured" if mode == "local" else "priced" for mode in shown}
    names = [name for name in next(iter(rows.values())) if f"{name}_low" in rows["sys"]][: len(shown["sys"])]
    assert names[:3] == ["trials", "itl_ms", "ttft_ms"] and len(names) == len(shown["sys"])
    for mode, texts in shown.items():
        for name, text in zip(names, texts, strict=True):
            figures = [f"{float(each.replace(',', '')):g}" for each in re.findall(r"\d[\d.,]*", text)]
            in_csv = [rows[mode][f"{name}{ending}"] for ending in ("", "_low", "_high")]
            assert [f"{float(each):g}" for each in in_csv if each] == figures, (mode, name)
    assert (rows["sys"]["rtt"], rows["sys"]["rate"], rows["sys"]["window"]) == ("10ms", "1Gbit", "16")


def test_a_click_on_the_map_goes_to_that_link(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    page.locator("#map .mark-rect path").first.click()
    page.wait_for_function("location.hash.includes('rtt=0.05ms')")
    assert "rate=10Mbit" in page.evaluate("location.hash")


def test_priced_and_measured_differ_by_word_and_shape(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    marks = {
        mark.get_attribute("aria-label"): mark.get_attribute("d") for mark in page.locator("#itl [aria-roledescription='point']").all()
    }
    by_kind = {kind: {shape for label, shape in marks.items() if f"kind: {kind}" in label} for kind in ("priced", "measured")}
    assert len(by_kind["priced"]) == len(by_kind["measured"]) == 1 and by_kind["priced"] != by_kind["measured"]
    assert page.locator("#map [aria-roledescription='point']").count() == 3, "two measured networks and this link"


def test_measured_networks_are_on_the_map_and_in_a_table_with_the_errors_of_prices_without_them(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    labels = [each.get_attribute("aria-label") or "" for each in page.locator("#map [aria-roledescription='point']").all()]
    assert {re.search(r"network: (\w+)", label)[1] for label in labels if "network" in label} == {"near", "far"}
    assert all(re.search(r"priced without it: latency off by up to [\d.]+%", label) for label in labels if "network" in label)
    assert page.locator("#map text", has_text="latency off by ").count() == 4, "each with its halo"
    measured = network.table(load_recorded(run, recorded_cells(run))).query("phase == 'decode' and of_phase").to_dict("records")
    shown = [[cell.inner_text() for cell in row.locator("th, td").all()] for row in page.locator("#measured tbody tr").all()]
    expected = [[cell_text(row, column) for column in MEASURED] for row in measured]
    assert [[re.sub(r"\s\(\d+\)$", "", text.replace("\u00a0", " ")) for text in row] for row in shown] == expected


def test_a_network_that_cannot_be_on_the_map_is_named_with_the_reason(opened: Opened, tmp_path: Path) -> None:
    fast = {"goodput_up_bytes_per_s": 1e18, "goodput_down_bytes_per_s": 1e18}
    trials = [dataclasses.replace(each, probe={**each.probe, **fast}) if each.network == "near" else each for each in whole_run()]
    make_explorer(results(tmp_path / "trials", *trials), tmp_path / "explorer.html")
    page = opened(tmp_path / "explorer.html")
    assert page.inner_text("#map-off").startswith("Not on the map: near (the probe's transfer took no longer than its round trip")


def test_the_tab_key_leads_through_all_controls_in_the_order_that_is_read(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["rtt", "rate", "model", "phase", "window", "csv"]
    with page.expect_download():
        page.keyboard.press("Enter")


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)])
def test_axe_finds_nothing_that_keeps_a_reader_out(run: Path, opened: Opened, scheme: str, size: dict[str, int]) -> None:
    page = opened(run / "explorer.html", viewport=size, color_scheme=scheme)
    page.locator("summary").click()
    found = axe.Axe().run(page)
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found.response["violations"]] == []


def test_every_control_has_a_name_and_every_chart_a_description_and_a_table(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    for role, names in (("slider", ("Round trip", "Rate, each way")), ("combobox", ("Model", "Phase", "Window of modes with windows"))):
        assert all(page.get_by_role(role, name=name).count() == 1 for name in names)
    assert page.locator("[role='graphics-document'][aria-label*=' ']").count() == 6
    assert page.locator("#map [aria-roledescription='rect mark']").count() == 0, "552 rectangles; the table has them"
    page.locator("summary").click()
    assert page.locator("#map-table tbody tr").first.inner_text().startswith("0.05 ms")
    assert page.locator("#map-table tbody tr").last.inner_text().endswith("none of them; nearest sys")


def test_the_page_says_what_its_figures_are_of(run: Path, opened: Opened) -> None:
    page = opened(run / "explorer.html")
    captions = [" ".join(each.split()) for each in page.locator("figcaption").all_inner_texts()]
    assert any(each.startswith("ITL inter-token latency") for each in captions)
    assert any(each.startswith("TTFT time to first token") for each in captions)
    assert any(each.startswith("Cheapest knowledge within 5% of its own compute") for each in captions)
    page.select_option("#phase", "prefill")
    drawn(page)
    assert page.inner_text("#map-figure figcaption").startswith("Cheapest knowledge within 5% of local")
    assert "comes within 5% of local; the nearest is remote_cache, " in page.inner_text("#answer")


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE)], ids=("light", "dark", "phone"))
def test_the_page_fits_the_window_in_light_and_dark_and_on_a_phone(
    run: Path, opened: Opened, tmp_path: Path, scheme: str, size: dict[str, int]
) -> None:
    page = opened(run / "explorer.html", viewport=size, color_scheme=scheme)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    charts = page.locator(".chart svg").all()
    assert len(charts) == 6
    assert all(chart.bounding_box()["width"] > 250 for chart in charts)
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text > back) == (scheme == "dark")


@pytest.mark.parametrize("size", [*NARROW, PHONE], ids=("1200", "1280", "phone"))
def test_tables_fit_a_narrow_desktop_and_scroll_on_a_phone(wide: Path, opened: Opened, size: dict[str, int]) -> None:
    page = opened(wide, "#rtt=200ms&rate=10Mbit", viewport=size)
    for table in page.locator(".scroll").all():
        room, wanted = table.evaluate("(each) => [each.clientWidth, each.scrollWidth]")
        assert (wanted <= room) == (size is not PHONE), table.get_attribute("aria-label")
        table.evaluate("(each) => each.scrollTo(1e4, 0)")
        first, last = (table.locator("tbody tr").first.locator("th, td").nth(at).bounding_box() for at in (0, -1))
        own = table.bounding_box()
        assert first["x"] == pytest.approx(own["x"], abs=2) and last["x"] + last["width"] == pytest.approx(own["x"] + own["width"], abs=2)


def test_a_run_that_lacks_everything_is_shown_with_words(opened: Opened, tmp_path: Path) -> None:
    make_explorer(results(tmp_path / "trials", *poor_run()), tmp_path / "explorer.html")
    page = opened(tmp_path / "explorer.html")
    move(page, "rtt", len(RTTS) - 1)
    words = page.inner_text("#words")
    for word in ("One network was run", "One trial of each mode", "No local mode was run", "No prefill phase was run"):
        assert word in words
    assert "one trial has no interval" in page.inner_text("#priced-notes")
    assert cells(page, "priced")["sys"][5] == "null"


def test_a_run_without_anything_to_price_says_so_and_shows_no_controls(opened: Opened, tmp_path: Path) -> None:
    make_explorer(results(tmp_path / "trials", *pressed("sys_delta", (Pressed(0.1, 0.5, "delta"),))), tmp_path / "explorer.html")
    page = opened(tmp_path / "explorer.html")
    assert "This run has no prefill or decode phase" in page.inner_text("#answer")
    assert not page.is_visible("#controls") and not page.is_visible("#shown")
