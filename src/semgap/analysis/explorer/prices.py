"""What the explorer shows: prices over a grid of links, their parts, and the map of the ladder, as texts that Python rounded."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from semgap.analysis.calls import SPENT, recorded_windows
from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.marks import rungs
from semgap.analysis.price import VIEWS, Cell, Recorded
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, cell_text

WITHIN = 0.05
"""A mode comes within this of local on the map."""
GRID = LinkGrid.parsed("0.05ms..200ms", "10Mbit..400Gbit")
RTTS_MS, RATES = tuple(GRID.rtt_ms.values()), tuple(GRID.rate_mbit_per_s)
LINKS = [(link["rtt"], link["rate"]) for link, _ in GRID.links()]
"""The sliders' links, as `semgap price` takes them: all rates of the first round trip, then those of the second one."""


def _edges(values: Sequence[float]) -> list[float]:
    """The middles between neighbours on the log scale, and an end on either side."""
    inner = [(low * high) ** 0.5 for low, high in pairwise(values)]
    return [values[0] ** 2 / inner[0], *inner, values[-1] ** 2 / inner[-1]]


RTT_EDGES, RATE_EDGES = _edges(RTTS_MS), _edges(tuple(GRID.rate_mbit_per_s.values()))
"""The ends of the links' rectangles on the map."""
LONGER = (2, 4, 8, 16)
"""Windows to choose from, as multiples of the recorded one."""
PRICED = VIEWS[0].columns
PARTS = (
    Column("worker_compute_ms", "worker's compute (ms)", "digits", reason="parts_reason"),
    Column("client_compute_ms", "client's compute (ms)", "digits", null="-"),
    Column("worker_codec_ms", "worker's codec (ms)", "digits", null="-"),
    Column("client_codec_ms", "client's codec (ms)", "digits", null="-"),
    Column("link_ms", "link and the rest (ms)", "digits", null="-"),
    Column("gap_ms", "gap (ms)", "digits", null="-"),
    Column("own_ratio", "x own compute", "ratio", null="-"),
)
"""The parts of a token's time, as in table gap: the gap is latency less compute, the link what is left of it without the codec."""
NO_CLOCK = "the compute of a step was not measured"
NO_PRICE = "without a price there are no parts"
COLUMNS = (*PRICED[1:], *PARTS)


@dataclass
class Series:
    """A mode over all of `LINKS`: its texts and reasons by column, and how far it is from local. `window`: tokens of a call, if chosen."""

    cell: Cell
    window: int | None
    texts: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    to_local: list[float | None] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """The row of the next link."""
        for column in COLUMNS:
            self.texts.setdefault(column.source, []).append(cell_text(row, column))
            reason = row.get(column.reason) if column.reason else None
            if reason:
                self.reasons[column.source] = reason
        # As claims of latency: modes compute the same in a decode step, and not the same rows of a prefill.
        self.to_local.append(row["own_ratio" if self.cell.metric == "ITL" else "ratio_to_local"])

    def described(self, local: bool) -> dict[str, Any]:
        """As JSON. A column of equal texts has one."""
        texts = {name: values[:1] if len(set(values)) == 1 else values for name, values in self.texts.items()}
        mode = {"mode": self.cell.row["mode"], "local": local, "window": self.window, "recorded": self.cell.window}
        return {**mode, "texts": texts, "reasons": self.reasons}


def priced_series(results: Results) -> list[Series]:
    """Every mode of every phase and model over all of `LINKS`; a mode with windows once more for each longer one."""
    recorded = Recorded.of(results)
    series = _over_links(recorded, [Series(cell, None) for cell in recorded.cells])
    local = results.rows.loc[results.rows["placement"] == "local", "mode"].unique()
    some = replace(results, calls=results.calls[(recorded_windows(results.calls) > 1) | results.calls["mode"].isin(local)])
    for window in sorted({window for cell in recorded.cells for window in longer(recorded.cells, cell)}):
        other = Recorded.of(some, window)
        chosen = [cell for cell in other.cells if cell.window == window and window in longer(recorded.cells, cell)]
        series += _over_links(other, [Series(cell, window) for cell in chosen])
    return series


def longer(cells: Sequence[Cell], like: Cell) -> list[int]:
    """The windows to choose from in a cell's phase; none without a mode that has windows."""
    most = max(cell.window for cell in cells if all(cell.row[key] == like.row[key] for key in ("model", "phase")))
    return [most * times for times in LONGER] if most > 1 else []


def _over_links(recorded: Recorded, every: list[Series]) -> list[Series]:
    spent = [spent_ms(recorded, series.cell) for series in every]
    for _, link in GRID.links():
        seconds = recorded.seconds(link)
        for series, parts in zip(every, spent, strict=True):
            row = {**series.cell.row, **series.cell.priced(seconds)}
            series.add(row | parts_of(row[f"{series.cell.metric.lower()}_ms"], parts))
    return every


def spent_ms(recorded: Recorded, cell: Cell) -> dict[str, float | None]:
    """The times of `SPENT` per token by the clocks of worker and client, averaged as the cell's price."""
    group = cell.groups.get(cell.metric)
    if group is None:
        return dict.fromkeys(SPENT)
    means = {name: 1e3 * float(np.mean(group.over_networks(group.per_token(recorded.calls[name].to_numpy("float64"))))) for name in SPENT}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}


def parts_of(latency_ms: float | None, spent: Mapping[str, float | None]) -> dict[str, Any]:
    """The columns of `PARTS`, null where a clock is missing, and `parts_reason`."""
    worker, client, codecs = spent["worker_compute"], spent["client_compute"] or 0.0, (spent["client_codec"], spent["worker_codec"])
    if latency_ms is None or worker is None:
        empty: dict[str, Any] = dict.fromkeys(column.source for column in PARTS)
        return empty | {"parts_reason": NO_PRICE if latency_ms is None else NO_CLOCK}
    gap_ms = latency_ms - worker - client
    return {
        **{f"{name}_ms": value for name, value in spent.items()},
        "client_compute_ms": client,
        "link_ms": gap_ms - sum(codec or 0.0 for codec in codecs),
        "gap_ms": gap_ms,
        "own_ratio": latency_ms / (worker + client) if worker + client else None,
        "parts_reason": None,
    }


def cheapest(results: Results, series: Sequence[Series]) -> Iterator[dict[str, Any]]:
    """The maps of one phase: for the recorded windows (None) and each other one, over all of `LINKS` the lowest rung within `WITHIN`.

    A rung is its place in `modes`, the ladder's modes that have a price; null if none of them comes within. There `nearest` has the rung
    that comes nearest, the lowest of equal ones, and its distance as a text; elsewhere null.
    """
    by_mode = {(each.cell.row["mode"], each.window): each for each in series}
    modes = [mode for mode in rungs(results.marks) if (mode, None) in by_mode and None not in by_mode[mode, None].to_local]
    for window in dict.fromkeys(each.window for each in series):
        chosen = [by_mode.get((mode, window), by_mode[mode, None]).to_local for mode in modes]
        ratios = [[math.inf if ratio is None else ratio for ratio in each] for each in zip(*chosen, strict=True)]
        lowest = [next((rung for rung, ratio in enumerate(each) if ratio <= 1 + WITHIN), None) for each in ratios]
        nearest = [_nearest(each) if rung is None else None for rung, each in zip(lowest, ratios, strict=True)]
        yield {"window": window, "modes": modes, "lowest": lowest, "nearest": nearest}


def _nearest(ratios: Sequence[float]) -> dict[str, Any] | None:
    """The rung of the smallest ratio to local, and its distance; None if no rung has a ratio."""
    least = min(ratios)
    return {"rung": ratios.index(least), "above": f"{least - 1:,.1%}"} if math.isfinite(least) else None
