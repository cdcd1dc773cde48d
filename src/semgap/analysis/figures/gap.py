"""Figure gap: where a token's time goes, per mode and network."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from semgap.analysis.aggregate import SETTING, alike
from semgap.analysis.figures.axes import FAR, beside, draw_arrows, milliseconds_text, mode_axis
from semgap.analysis.figures.facets import KV_PHASES_ALONE
from semgap.analysis.figures.panels import LEGEND_IN, axes_in, panels_with_names, saying
from semgap.analysis.figures.style import BLACK, GREY, LIGHT, handle, legend, styled
from semgap.analysis.results import Results
from semgap.analysis.tables import gap

PARTS: Mapping[str, tuple[str, str]] = {
    "worker_compute_ms": ("compute, worker", "#b8b8b8"),
    "client_compute_ms": ("compute, client", "#CC79A7"),
    "client_codec_ms": ("codec, client", "#E69F00"),
    "worker_codec_ms": ("codec, worker", "#009E73"),
    "link_ms": ("link", "#0072B2"),
    "unknown_ms": ("gap without parts", "#56B4E9"),
}
GAP = ("client_codec_ms", "worker_codec_ms", "link_ms", "unknown_ms")
TITLE_IN = 0.42


@styled()
def plot(results: Results) -> Figure:
    """The table `gap`: two panels for each model, network and phase, a bar a mode.

    Left: the whole latency per token. Right: the gap alone, with its 95% interval over trials. A bar far above the others ends in an arrow.
    """
    table = gap.table(results)
    table = table[table["gap_ms"].notna()]
    if table.empty:
        return saying(KV_PHASES_ALONE if alike(results.rows).empty else "compute was not measured")
    parts_known = table["link_ms"].notna()
    table = table.assign(unknown_ms=table["gap_ms"].where(~parts_known))
    groups = [rows for _, rows in table.groupby(SETTING, sort=False)]
    names = [mode for rows in groups for mode in rows["mode"]]
    figure, boxes = panels_with_names(names, 2, 1.7 * LEGEND_IN, [(TITLE_IN, len(rows)) for rows in groups])
    for rows, (left, right) in zip(groups, boxes, strict=True):
        whole, alone = axes_in(figure, left), axes_in(figure, right)
        _draw_bars(whole, rows, list(PARTS), rows["latency_ms"])
        first = rows.iloc[0]
        whole.set_title(f"{first['phase']}\n{first['model']}, {first['network']}", loc="left")
        whole.set_xlabel(f"{first['latency_metric']} (ms)")
        _draw_bars(alone, rows, list(GAP), rows["gap_ms"])
        _draw_intervals(alone, rows)
        alone.set_xlabel("gap per token (ms)")
    shown = [Patch(color=colour, label=label) for name, (label, colour) in PARTS.items() if table[name].abs().sum() > 0]
    legend(figure, [*shown, handle("95% interval", color=BLACK, lw=1.2)], columns=4)
    return figure


def _draw_bars(ax: Axes, rows: pd.DataFrame, parts: list[str], totals: pd.Series) -> None:
    mode_axis(ax, rows["mode"].tolist())
    ax.grid(axis="x", color=LIGHT, lw=0.6, zorder=1)
    near = totals[totals <= FAR * totals.median()]
    ends = rows["gap_ms_high"].astype("float64").where(rows["gap_ms"] <= near.max()).max() if totals.name == "gap_ms" else np.nan
    right = 1.05 * np.nanmax([near.max(), min(ends, 1.5 * near.max())])
    ax.set_xlim(min(0.0, 1.05 * totals.min()), right)
    for row, (_, values) in enumerate(rows.iterrows()):
        begin = 0.0
        for part in parts:
            width = float(values[part]) if pd.notna(values[part]) else 0.0
            ax.barh(row, width, left=begin, height=0.6, color=PARTS[part][1], lw=0, zorder=3)
            begin += width
        total = float(values[str(totals.name)])
        draw_arrows(ax, row, (0.0, total), (-np.inf, right))
        beside(ax, row, milliseconds_text(total))


def _draw_intervals(ax: Axes, rows: pd.DataFrame) -> None:
    limits = ax.get_xlim()
    for row, (mean, low, high) in enumerate(rows[["gap_ms", "gap_ms_low", "gap_ms_high"]].astype("float64").itertuples(index=False)):
        if np.isfinite(low) and mean <= limits[1]:
            ax.plot(np.clip([low, high], *limits), [row + 0.36] * 2, color=BLACK, lw=1.2, zorder=4)
            draw_arrows(ax, row + 0.36, (low, high), limits)
    ax.axvline(0, color=GREY, lw=0.6, zorder=2)
