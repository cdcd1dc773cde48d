"""Figure price: latency of each mode over links that were not run, over the round trip and over the rate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from semgap.analysis.figures.axes import FAR, log_log_axes, with_ends
from semgap.analysis.figures.facets import KV_PHASES_ALONE
from semgap.analysis.figures.panels import WIDTH_IN, Box, axes_in, headline, lines_of_panels, saying
from semgap.analysis.figures.style import BLACK, COLOURS, DASHED, GREY, POINT, LineStyle, handle, legend, mode_styles, styled
from semgap.analysis.held_out import METRICS
from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.price import Recorded, recorded_with
from semgap.analysis.results import Results
from semgap.analysis.tables import network

GRID = LinkGrid.parsed("0.1ms..100ms", "100Mbit..100Gbit")
"""The links of the default figure."""
PANELS = 3
NEAR = 0.1
"""A panel shows the networks that were run whose round trip or rate differs from the panel's by no more than this."""
ROOM = 1.8
"""The part of a log axis, as a factor, above all modes but the one that leaves it."""
STROKES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
"""Lines of the first modes, one of each colour, then of the next ones, whose colours are the same again."""
NAMES = {"rtt_ms": "round trip", "rate_mbit_per_s": "rate"}
UNITS = {"rtt_ms": "ms", "rate_mbit_per_s": "Mbit/s"}
ENTRIES = 4
TICKS_IN, HEIGHT_IN, HEAD_IN, LINE_IN, BETWEEN_IN = 0.6, 1.75, 0.53, 0.19, 0.15


@dataclass(frozen=True)
class _Panel:
    """Prices over links that share a rate or a round trip, and what was measured over such networks: latencies in ms (`with_ends`)."""

    title: str
    prices: pd.DataFrame
    measured: pd.DataFrame


@dataclass(frozen=True)
class _Line:
    """Panels side by side, with the same axes: a metric over a column of all their rows."""

    title: str
    metric: str
    across: str
    panels: tuple[_Panel, ...]

    @property
    def rows(self) -> pd.DataFrame:
        """The prices and the measured latencies of all panels."""
        return pd.concat([rows for panel in self.panels for rows in (panel.prices, panel.measured)])

    @property
    def far(self) -> str | None:
        """The mode that alone would stretch the axis: above `FAR` times the highest value of each other mode, of at least three."""
        highest = self.rows.groupby("mode")["mean"].max().sort_values()
        return str(highest.index[-1]) if len(highest) > 3 and highest.iloc[-1] > FAR * highest.iloc[-2] else None

    def across_ends(self) -> tuple[float, float]:
        return float(self.rows[self.across].min()), float(self.rows[self.across].max())

    def heights(self) -> tuple[float, float]:
        """The lowest and the highest value, with room for the words on a far mode, which leaves the axis."""
        values = self.rows.loc[self.rows["mode"] != self.far, "mean"]
        return float(values.min()), float(values.max()) * (ROOM if self.far else 1)


@dataclass(frozen=True)
class _Side:
    """Prices along one column of the links, at a few values of the other one, `held_column`: `held` has their texts and numbers."""

    across: str
    held_column: str
    held: Mapping[str, float]
    prices: pd.DataFrame

    def line(self, model: str, phase: str, metric: str, cells: pd.DataFrame) -> _Line:
        """The panels of a model and phase. `cells`: as by `_measured`."""
        prices, measured = (rows[(rows["model"] == model) & (rows["phase"] == phase)] for rows in (self.prices, cells))
        prices = prices.join(with_ends(prices, f"{metric.lower()}_ms")).dropna(subset="mean")
        measured = measured[measured["metric"] == metric]
        named = NAMES[self.held_column]
        panels = (
            _Panel(f"{named} {text}", prices[prices[self.held_column] == value], measured[_near(measured[f"of_{self.held_column}"], value)])
            for text, value in self.held.items()
        )
        return _Line(f"{metric} over the {NAMES[self.across]}, {phase} ({model})", metric, self.across, tuple(panels))


def plot(results: Results) -> Figure:
    """Prices over `GRID`, as `plot_grid` draws them."""
    return plot_grid(results, recorded_with(results), GRID)


@styled()
def plot_grid(results: Results, recorded: Recorded, grid: LinkGrid) -> Figure:
    """ITL or TTFT of each model and phase as `semgap price` prints it: a line a mode, with a band for its interval.

    Over the round trip, a panel for each of up to `PANELS` rates of the grid; over the rate, one for each of up to as many round trips.
    Those of networks that were run come first; points show latencies measured over them, with 95% t intervals. A mode without a price has
    no line. A mode far above all others leaves the axis, with an arrow. ValueError for a single link, and for a round trip of 0.
    """
    _require_lines(grid)
    cells = _measured(results, recorded)
    sides = list(_sides(recorded, grid, cells)) if recorded.cells else []
    lines = [side.line(*group, cells) for group in _groups(recorded) for side in sides]
    lines = [line for line in lines if any(len(panel.prices) for panel in line.panels)]
    if not lines:
        return saying("no mode has a price" if recorded.cells else KV_PHASES_ALONE)
    local = set(results.rows.loc[results.rows["placement"] == "local", "mode"])
    shown = [rows["mode"] for line in lines for panel in line.panels for rows in (panel.prices, panel.measured)]
    styles = mode_styles(mode for mode in pd.concat(shown) if mode not in local)
    figure, boxes = _boxes(lines, len(styles))
    for line, own in zip(lines, boxes, strict=True):
        _draw_line(figure, own, line, styles)
    _legend(figure, styles, local=bool(local), measured=any(len(panel.measured) for line in lines for panel in line.panels))
    return figure


def _require_lines(grid: LinkGrid) -> None:
    if len(grid) == 1:
        link = ", ".join([*grid.rtt_ms, *grid.rate_mbit_per_s])
        raise ValueError(f"one link ({link}) draws no line; ask for several, e.g. --rtt 1ms..100ms")
    for text, trip_ms in grid.rtt_ms.items():
        if trip_ms == 0:
            raise ValueError(f"round trip {text} has no place on the log axis of the figure; leave it out, or begin at e.g. 0.01ms")


def _measured(results: Results, recorded: Recorded) -> pd.DataFrame:
    """Remote cells of the table `network` over a known link, whose calls had as many tokens as those that are priced.

    `rtt_ms` and `rate_mbit_per_s` (down) were probed; `of_rtt_ms` and `of_rate_mbit_per_s` are the configured ones, which pick the panel,
    or, if the config sets none, the network's mean of the probed ones.
    """
    table = network.table(results)
    cells = table[~table["local"].astype(bool) & table["rtt_ms"].notna() & table["goodput_down_mbit_per_s"].notna()]
    windows = {tuple(cell.row[key] for key in ("model", "phase", "mode")): cell.window for cell in recorded.cells}
    tokens = results.calls.groupby(["model", "phase", "mode"])["tokens"].max()
    same = [windows[at] == tokens[at] for at in cells[["model", "phase", "mode"]].itertuples(index=False, name=None)]
    cells = cells[np.array(same, dtype=bool)]
    probed = cells.groupby("network")[["rtt_ms", "goodput_down_mbit_per_s"]].transform("mean")
    cells = cells.assign(
        rate_mbit_per_s=cells["goodput_down_mbit_per_s"],
        of_rtt_ms=cells["asked_rtt_ms"].fillna(probed["rtt_ms"]),
        of_rate_mbit_per_s=cells["asked_rate_mbit_per_s"].fillna(probed["goodput_down_mbit_per_s"]),
    )
    return cells.join(with_ends(cells, "latency_ms"))


def _groups(recorded: Recorded) -> Iterator[tuple[str, str, str]]:
    """Model, phase and metric. Decode phases also have TTFT if no prefill phase of the model has it."""
    metrics = {(cell.row["model"], cell.row["phase"]): cell.metric for cell in recorded.cells}
    for (model, phase), metric in metrics.items():
        alone = all(other == "ITL" for (of, _), other in metrics.items() if of == model)
        for each in METRICS if alone else (metric,):
            yield model, phase, each


def _sides(recorded: Recorded, grid: LinkGrid, cells: pd.DataFrame) -> Iterator[_Side]:
    """Over the round trip and over the rate, unless there is one alone."""
    if len(grid.rtt_ms) > 1:
        rates = _held(grid.rate_mbit_per_s, cells["of_rate_mbit_per_s"])
        yield _Side("rtt_ms", "rate_mbit_per_s", rates, recorded.over(LinkGrid(grid.rtt_ms, rates)))
    if len(grid.rate_mbit_per_s) > 1:
        trips = _held(grid.rtt_ms, cells["of_rtt_ms"])
        yield _Side("rate_mbit_per_s", "rtt_ms", trips, recorded.over(LinkGrid(trips, grid.rate_mbit_per_s)))


def _held(values: Mapping[str, float], measured: pd.Series) -> dict[str, float]:
    """Up to `PANELS` values, lowest first: those near measured ones, evenly thinned, then the highest, lowest and middle of all."""
    ordered = sorted(values, key=lambda text: values[text])
    near = [text for text in ordered if _near(measured, values[text]).any()]
    thinned = [near[place] for place in np.linspace(0, len(near) - 1, min(PANELS, len(near))).round().astype(int)]
    chosen = list(dict.fromkeys([*thinned, ordered[-1], ordered[0], ordered[len(ordered) // 2]]))[:PANELS]
    return {text: values[text] for text in ordered if text in chosen}


def _near(values: pd.Series, value: float) -> pd.Series:
    return (values / value - 1).abs() <= NEAR


def _boxes(lines: Sequence[_Line], modes: int) -> tuple[Figure, list[list[Box]]]:
    """A figure and the boxes of its panels, the first of each line with tick labels."""
    figure, bottoms = lines_of_panels(-(-(modes + 3) // ENTRIES) * LINE_IN + 0.12, [(HEAD_IN, HEIGHT_IN)] * len(lines))
    most = max(len(line.panels) for line in lines)
    width = (WIDTH_IN - TICKS_IN - 0.1 - (most - 1) * BETWEEN_IN) / most
    firsts = (Box(TICKS_IN, bottom, width, HEIGHT_IN) for bottom in bottoms)
    return figure, [first.repeated(len(line.panels), BETWEEN_IN) for first, line in zip(firsts, lines, strict=True)]


def _draw_line(figure: Figure, boxes: Sequence[Box], line: _Line, styles: Mapping[str, LineStyle]) -> None:
    headline(figure, boxes[0], line.title)
    for box, panel in zip(boxes, line.panels, strict=True):
        ax = axes_in(figure, box)
        log_log_axes(ax, line.across_ends(), line.heights())
        ax.set_title(panel.title, loc="left", fontsize=8)
        ax.set_xlabel(f"{NAMES[line.across]} ({UNITS[line.across]})")
        if box.named:
            ax.set_ylabel(f"{line.metric} (ms)")
        _draw_prices(ax, panel.prices, line.across, styles)
        _draw_measured(ax, panel.measured, line.across, styles)
        if line.far:
            _draw_far(ax, line.far, panel.prices, styles)


def _draw_prices(ax: Axes, prices: pd.DataFrame, across: str, styles: Mapping[str, LineStyle]) -> None:
    """A line and a band a mode; modes without a style are local."""
    for mode, rows in prices.sort_values(across, kind="stable").groupby("mode", sort=False):
        if mode not in styles:
            ax.plot(rows[across], rows["mean"], color=GREY, lw=1.2, ls=DASHED, zorder=2)
            continue
        colour = styles[str(mode)][0]
        ax.fill_between(rows[across], rows["low"].clip(lower=1e-6), rows["high"], color=colour, alpha=0.15, lw=0, zorder=1)
        ax.plot(rows[across], rows["mean"], color=colour, lw=0.9, ls=_stroke(str(mode), styles), zorder=3)


def _draw_measured(ax: Axes, cells: pd.DataFrame, across: str, styles: Mapping[str, LineStyle]) -> None:
    for mode, rows in cells.groupby("mode", sort=False):
        colour, marker = styles[str(mode)]
        ax.vlines(rows[across], rows["low"].clip(lower=1e-6), rows["high"], color=colour, lw=1.0, zorder=3)
        ax.plot(rows[across], rows["mean"], color=colour, marker=marker, ls="", **POINT)


def _draw_far(ax: Axes, mode: str, prices: pd.DataFrame, styles: Mapping[str, LineStyle]) -> None:
    """An arrow with the mode's lowest and highest price, if it leaves the axis."""
    values = prices.loc[prices["mode"] == mode, "mean"]
    if len(values) and values.max() > ax.get_ylim()[1]:
        ends = dict.fromkeys(f"{end / 1e3:.2g}" for end in (values.min(), values.max()))
        words = f"\u25b2 {mode}: {' to '.join(ends)} s"
        ax.annotate(words, (0, 1), (3, -3), xycoords="axes fraction", textcoords="offset points", va="top", color=styles[mode][0])


def _stroke(mode: str, styles: Mapping[str, LineStyle]) -> Any:
    return STROKES[list(styles).index(mode) // len(COLOURS) % len(STROKES)]


def _legend(figure: Figure, styles: Mapping[str, LineStyle], local: bool, measured: bool) -> None:
    look: dict[str, Any] = {"ms": 5, "mec": "white", "mew": 0.3, "lw": 0.9}
    shown: list[Any] = [handle(mode, color=styles[mode][0], marker=styles[mode][1], ls=_stroke(mode, styles), **look) for mode in styles]
    shown += [handle("local", color=GREY, lw=1.2, ls=DASHED)] if local else []
    shown.append(Patch(color=BLACK, alpha=0.15, lw=0, label="priced: line, interval"))
    shown += [handle("measured: mark, interval", color=BLACK, marker="o", ms=4, ls="")] if measured else []
    legend(figure, shown, columns=ENTRIES)
