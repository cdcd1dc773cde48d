"""The text of `semgap price`: recorded trials, restores and loads over other links."""

from pathlib import Path

import pandas as pd

from semgap.analysis.link_grid import LinkGrid
from semgap.analysis.load_price import loads_over
from semgap.analysis.price import LOAD_VIEWS, VIEWS, VIEWS_BY_LINK, recorded_with
from semgap.analysis.restores import restores_over
from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View, to_markdown

RESTORE_VIEWS = (
    View(
        "Recovery, priced",
        (
            Column("mode", "mode"),
            Column("evict_fraction", "evicted (%)", "percent"),
            Column("trials", "trials", "count"),
            Column("wait_ms", "wait for blocks (ms) [interval]", "digits", reason="wait_ms_reason"),
            Column("itl_ms", "ITL (ms) [interval]", "digits", reason="itl_ms_reason"),
            Column("missing_bytes_per_step", "missing (MB/step)", "digits", 1e-6),
            Column("fetched_network_bytes_per_step", "fetched (MB/step)", "digits", 1e-6),
            Column("wait_model_error_ms", "model's worst error (ms)", "digits", null="not known"),
        ),
        "Over two links: the client's, and that between worker and KV host. Wait: the time that a step waits for its missing blocks. Means "
        "over trials of a trial's median step, 95% t intervals.",
        by=("rtt", "rate", "kv_rtt", "kv_rate", "model", "phase", "from_networks"),
    ),
)


def price_text(
    results: Results, grid: LinkGrid, kv_grid: LinkGrid | None, window: int | None, figure: Path | None, csv: Path | None
) -> str:
    """The tables as text. Writes the figure and the unrounded prices if their files are given.

    `kv_grid`: links between worker and KV host, for recovery phases. LookupError without a trial that has a price; ValueError as of
    `recorded_with`.
    """
    recorded = recorded_with(results, window)
    table, loads = recorded.over(grid), loads_over(results.load, grid)
    restored = pd.DataFrame() if kv_grid is None else restores_over(results.restores, results.restores_held_out, grid, kv_grid)
    if table.empty and (figure or csv or (loads.empty and restored.empty)):
        way_out = "recovery phases over networks with kv take --kv-rtt and --kv-rate, open loops have no price"
        raise LookupError(f"holds no trials of prefill or decode phases; {way_out}")
    if figure:
        from semgap.analysis.figures.price import plot_grid
        from semgap.analysis.figures.style import save_as

        save_as(plot_grid(results, recorded, grid), figure)
    if csv:
        table.to_csv(csv, index=False, lineterminator="\n")
    longer = f" Modes with windows: {window} tokens a call." if window else ""
    links = "a link" if len(grid) == 1 else f"{len(grid)} links"
    head = f"Over {links} of {', '.join(grid.rtt_ms)} round trip and {', '.join(grid.rate_mbit_per_s)} each way.{longer}\n\n"
    views = VIEWS if len(grid) == 1 else VIEWS_BY_LINK
    shown = ((table, views), (restored, RESTORE_VIEWS), (loads, LOAD_VIEWS))
    return head + "\n".join(to_markdown(frame, each) for frame, each in shown if len(frame))
