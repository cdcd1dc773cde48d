"""The figure price, and `semgap price` over several links, on trials over links simulated packet by packet."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_texts import unreadable_texts
from simulated_links import Network, Traffic, simulated
from written_trials import Pressed, pressed, results

from semgap.analysis.figures import price as price_figure
from semgap.analysis.figures.style import save, save_as
from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.links import LinkModel
from semgap.analysis.price import price, recorded_with
from semgap.analysis.results import Results
from semgap.analysis.tables import network

LOCAL = Traffic("local", 0, 0)
REMOTE_CACHE = Traffic("remote_cache", 60, 196_700)
SYS = Traffic("sys", 50, 30, window=32)
NETWORKS = tuple(Network(f"{rtt_ms}ms-{mbit}Mbit", rtt_ms / 2e3, mbit * 1e6) for rtt_ms in (1, 20) for mbit in (100, 1000))
COMPUTE_S = 0.006
GRID = LinkGrid.parsed("0.5ms..100ms", "10Mbit..10Gbit")


def run(root: Path, modes: tuple[Traffic, ...] = (LOCAL, REMOTE_CACHE, SYS), networks: tuple[Network, ...] = NETWORKS) -> Results:
    return results(root, *(simulated(mode, at, trial, COMPUTE_S) for trial in (1, 2) for at in networks for mode in modes))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module")
def figure(found: Results) -> Any:
    return price_figure.plot_grid(found, recorded_with(found), GRID)


def titled(figure: Any, title: str) -> Any:
    """The first panel of that title: it shows ITL."""
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def lines(ax: Any) -> list[Any]:
    return [line for line in ax.lines if line.get_linestyle() != "None"]


def marks(ax: Any) -> list[tuple[float, float]]:
    points = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "None"]
    return [(float(x), float(y)) for each in points for x, y in each]


def test_panels_are_over_round_trip_and_rate_at_values_of_networks_that_were_run_then_at_the_highest(figure: Any) -> None:
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    over_rtt, over_rate = ["rate 100Mbit", "rate 1Gbit", "rate 10Gbit"], ["round trip 1ms", "round trip 20ms", "round trip 100ms"]
    assert titles == 2 * [*over_rtt, *over_rate], "ITL, and TTFT, since no prefill phase was run"
    headlines = [text.get_text().split(",")[0] for text in figure.texts]
    assert headlines == [f"{metric} over the {across}" for metric in ("ITL", "TTFT") for across in ("round trip", "rate")]
    assert unreadable_texts(figure) == []


def test_lines_are_the_prices_with_their_intervals_as_bands(found: Results, figure: Any) -> None:
    table = recorded_with(found).over(GRID)
    own = table.query("rate == '1Gbit' and mode == 'remote_cache'")
    ax = titled(figure, "rate 1Gbit")
    assert any(np.array_equal(line.get_xydata(), own[["rtt_ms", "itl_ms"]].to_numpy("float64")) for line in lines(ax))
    edges = np.concatenate([band.get_paths()[0].vertices for band in ax.collections if len(band.get_paths()) == 1])
    assert set(own["itl_ms_low"]) | set(own["itl_ms_high"]) <= set(edges[:, 1])
    over_rate = table.query("rtt == '20ms' and mode == 'sys'")[["rate_mbit_per_s", "itl_ms"]].to_numpy("float64")
    assert any(np.array_equal(line.get_xydata(), over_rate) for line in lines(titled(figure, "round trip 20ms")))


def test_marks_are_the_latencies_over_networks_of_the_panels_link(found: Results, figure: Any) -> None:
    table = network.table(found).query("metric == 'ITL' and mode != 'local'")
    fast = table.query("asked_rate_mbit_per_s == 1000")
    assert sorted(marks(titled(figure, "rate 1Gbit"))) == sorted(zip(fast["rtt_ms"], fast["latency_ms"], strict=True))
    far = table.query("asked_rtt_ms == 20")
    assert sorted(marks(titled(figure, "round trip 20ms"))) == sorted(zip(far["goodput_down_mbit_per_s"], far["latency_ms"], strict=True))
    assert marks(titled(figure, "rate 10Gbit")) == []


def test_measured_windows_are_no_marks_of_longer_ones(found: Results) -> None:
    ax = titled(price_figure.plot_grid(found, recorded_with(found, 64), GRID), "rate 1Gbit")
    assert len(marks(ax)) == 2 and len(lines(ax)) == 3


def test_a_list_of_round_trips_at_one_rate_has_no_panel_over_the_rate(found: Results) -> None:
    figure = price_figure.plot_grid(found, recorded_with(found), LinkGrid.parsed("10ms,1ms", "1Gbit"))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["rate 1Gbit"] * 2
    assert all(list(line.get_xdata()) == [pytest.approx(1), pytest.approx(10)] for line in lines(figure.axes[0]))


@pytest.mark.parametrize(
    ("rtts", "message"),
    [("1ms", r"one link \(1ms, 1Gbit\) draws no line; ask for several"), ("0ms,1ms", "round trip 0ms has no place on the log axis")],
)
def test_links_without_a_line_are_refused(found: Results, rtts: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        price_figure.plot_grid(found, recorded_with(found), LinkGrid.parsed(rtts, "1Gbit"))


def test_the_default_figure_needs_no_network(tmp_path: Path) -> None:
    figure = price_figure.plot(run(tmp_path, (LOCAL, SYS), (Network("loopback", 20e-6, 12e9),)))
    assert len(figure.axes) == 12 and not any(marks(ax) for ax in figure.axes)
    assert unreadable_texts(figure) == []


def test_a_mode_without_a_price_has_no_line(tmp_path: Path) -> None:
    """The frames of its windows waited for the link; its prefill has a price."""
    figure = price_figure.plot(run(tmp_path, (SYS,), (Network("slow", 0.005, 20e3),)))
    assert {text.get_text().split()[0] for text in figure.texts} == {"TTFT"}


def test_a_mode_that_alone_would_stretch_the_axis_leaves_it_with_an_arrow_that_says_how_far(tmp_path: Path) -> None:
    naive = Traffic("naive", 5_000_000, 200_000)
    found = run(tmp_path, (LOCAL, REMOTE_CACHE, SYS, naive), (Network("near", 5e-4, 1e9),))
    figure = price_figure.plot_grid(found, recorded_with(found), GRID)
    table = recorded_with(found).over(GRID)
    far, others = table[table["mode"] == "naive"], table[table["mode"] != "naive"]
    slow = titled(figure, "rate 10Mbit")
    assert others["itl_ms"].max() < slow.get_ylim()[1] < 3 * others["itl_ms"].max()
    own = far[far["rate"] == "10Mbit"]["itl_ms"] / 1e3
    assert [text.get_text() for text in slow.texts] == [f"\u25b2 naive: {own.min():.2g} to {own.max():.2g} s"]
    level = titled(price_figure.plot_grid(found, recorded_with(found), LinkGrid.parsed("1ms,2ms", "10Mbit")), "rate 10Mbit")
    assert [text.get_text() for text in level.texts] == [f"\u25b2 naive: {own.min():.2g} s"], "one text for both ends"
    alone = price_figure.plot_grid(found, recorded_with(found), LinkGrid.parsed("1ms,10ms", "1Gbit"))
    assert unreadable_texts(figure) == unreadable_texts(alone) == []


def test_a_run_without_any_price_says_why(tmp_path: Path) -> None:
    naive = run(tmp_path / "naive", (Traffic("naive", 5_000_000, 700_000),), (Network("slow", 0.005, 10e6),))
    recovery = results(tmp_path / "recovery", *pressed("sys_delta", (Pressed(0.1, 0.5, "delta"),)))
    said = [[text.get_text() for text in price_figure.plot(found).texts] for found in (naive, recovery)]
    assert said == [["no mode has a price"], ["only phases that move KV blocks were run: they have figures of their own"]]


def test_a_figure_is_saved_as_svg_png_and_pdf_with_fonts_that_publishers_take(figure: Any, tmp_path: Path) -> None:
    assert [file.name for file in save(figure, tmp_path / "price")] == ["price.svg", "price.png", "price.pdf"]
    pdf = (tmp_path / "price.pdf").read_bytes()
    assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf and b"CreationDate" not in pdf
    with pytest.raises(ValueError, match=r"price.jpg ends in none of .svg, .png, .pdf; name it e.g. price.pdf"):
        save_as(figure, tmp_path / "price.jpg")


def test_a_table_over_links_has_the_prices_of_each(found: Results) -> None:
    table = recorded_with(found).over(LinkGrid.parsed("1ms,20ms", "100Mbit"))
    far = table[table["rtt"] == "20ms"].drop(columns=["rtt", "rate", "rtt_ms", "rate_mbit_per_s"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(far, price(found, LinkModel.parsed("20ms", "100Mbit")))
