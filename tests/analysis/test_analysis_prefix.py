"""The table prefix and its figure, on trials with known numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from figure_texts import unreadable_texts
from written_trials import LAYER_BYTES, LAYERS, PROBE, RAW, Prefilled, Trial, load, prefilled, results_of

from semgap.analysis.aggregate import alike
from semgap.analysis.figures import prefix as prefix_figure
from semgap.analysis.tables import gap, prefix, summary
from semgap.analysis.tables.render import to_latex, to_markdown

LENGTHS = (64, 128, 256)
KV: dict[str, Any] = {
    "network": "kv_slow",
    "network_spec": {"kind": "loopback", "kv": "slow"},
    "kv_probe": PROBE | {"rtt_s": 1e-3, "goodput_down_bytes_per_s": 12e6},
}


def fetches(without_s: float, *with_s: float, how: str = "fetch_blocks", predicted: tuple[float, ...] = ()) -> tuple[Prefilled, ...]:
    """A trial's prefills: one of which nothing is known, and one of each length."""
    known = [
        Prefilled(
            seconds,
            length,
            how,
            0.02,
            (predicted[index], 0.5) if predicted else (None, None),
            fetched=int(1.001 * LAYERS * LAYER_BYTES * length),
        )
        for index, (length, seconds) in enumerate(zip(LENGTHS, with_s, strict=True))
    ]
    return (Prefilled(without_s, 0, "recompute"), *known)


def blocks(*trials: tuple[float, ...], mode: str = "prefix_blocks", predicted: tuple[float, ...] = (), **fields: Any) -> list[Trial]:
    each = [fetches(*seconds, predicted=predicted) for seconds in trials]
    return prefilled(mode, *each, **(KV | {"prefix": "fetch_blocks"} | fields))


def computes(*seconds: float, network: str = "loopback") -> list[Trial]:
    """Trials of the mode that computes all: every prefill takes so long, in each trial."""
    each = [tuple(Prefilled(value, length, None) for length in (0, *LENGTHS)) for value in seconds]
    return prefilled("prefix_recompute", *each, network=network)


def table_of(root: Path, *trials: Trial) -> pd.DataFrame:
    return prefix.table(results_of(load(root, *trials)))


def row_of(table: pd.DataFrame, mode: str, length: int) -> Any:
    (row,) = table[(table["mode"] == mode) & (table["prefix_tokens"] == length)].itertuples()
    return row


def test_there_is_one_row_for_each_mode_and_length_with_ttft_and_bytes(tmp_path: Path) -> None:
    table = table_of(tmp_path, *computes(0.5, 0.5), *blocks((0.5, 0.4, 0.3, 0.2), (0.5, 0.42, 0.3, 0.2)))
    assert table["prefix_tokens"].tolist() == [0, *LENGTHS] * 2
    row = row_of(table, "prefix_blocks", 64)
    assert (row.ttft_ms, row.ttft_ms_low < 410 < row.ttft_ms_high) == (pytest.approx(410), True)
    assert (row.trials, row.requests_per_trial, row.prompt_tokens, row.policy, row.kv_codec) == (2, 1, 576, "fetch_blocks", "raw")
    assert (row.kv_network, row.kv_rtt_ms) == ("slow", pytest.approx(1))
    assert row.missing_bytes == 64 * LAYERS * LAYER_BYTES and row.fetched_to_missing == pytest.approx(1.001, abs=1e-4)
    assert (row.fetch_requests, row.recompute_requests, row.fallback_requests) == (2, 0, 0)
    assert row_of(table, "prefix_blocks", 0).bytes_reason == "nothing was computed before"
    computed = row_of(table, "prefix_recompute", 64)
    assert pd.isna(computed.fetched_bytes) and computed.bytes_reason == computed.requests_reason == "the mode computes every prefix"


def test_the_ratio_to_computing_takes_its_trials_over_another_network_by_their_numbers(tmp_path: Path) -> None:
    table = table_of(tmp_path, *computes(0.5, 1.0), *blocks((0.5, 0.4, 0.3, 0.25), (1.0, 0.8, 0.6, 0.5)))
    row = row_of(table, "prefix_blocks", 256)
    assert row.ratio_to_recompute == pytest.approx(0.5) and row.ratio_to_recompute_low == pytest.approx(0.5)
    alone = table_of(tmp_path / "alone", *blocks((0.5, 0.4, 0.3, 0.25)))
    assert row_of(alone, "prefix_blocks", 256).ratio_to_recompute_reason == "no mode with prefix: recompute was run in this phase"


def test_the_crossing_is_where_fetching_becomes_slower_than_the_trial_s_own_request_without_a_prefix(tmp_path: Path) -> None:
    """At 128 tokens 0.1 s sooner, at 256 0.3 s later: a quarter of the way between."""
    table = table_of(tmp_path, *blocks((0.5, 0.45, 0.4, 0.8), (0.5, 0.45, 0.4, 0.8), predicted=(0.4, 0.45, 0.55)))
    row = row_of(table, "prefix_blocks", 64)
    assert row.crossing_tokens == pytest.approx(160) and row.crossing_tokens_low == pytest.approx(160)
    assert row.predicted_crossing_tokens == pytest.approx(192)
    assert row.predicted_fetch_ms == pytest.approx(400) and row.predicted_recompute_ms == pytest.approx(500)


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ([(0.5, 0.45, 0.4, 0.3)], "fetching is quicker at every length"),
        ([(0.5, 0.6, 0.7, 0.8)], "fetching is slower at every length"),
        ([(0.5, 0.45, 0.4, 0.3), (0.5, 0.45, 0.4, 0.6)], "trials differ: fetching is quicker at every length, 192.0"),
    ],
)
def test_without_a_crossing_the_table_says_on_which_side_all_lengths_lie(
    tmp_path: Path, seconds: list[tuple[float, ...]], why: str
) -> None:
    row = row_of(table_of(tmp_path, *blocks(*seconds)), "prefix_blocks", 64)
    assert pd.isna(row.crossing_tokens) and row.crossing_tokens_reason == why
    assert row.predicted_crossing_tokens_reason.startswith("no request found a prefix")


def test_a_trial_without_a_prediction_has_no_side_of_the_predicted_crossing(tmp_path: Path) -> None:
    first, second = blocks((0.5, 0.45, 0.4, 0.3), predicted=(0.4, 0.45, 0.48)) + blocks((0.5, 0.45, 0.4, 0.3))
    row = row_of(table_of(tmp_path, first, replace(second, trial=2)), "prefix_blocks", 64)
    assert row.predicted_crossing_tokens_reason == f"trials differ: {prefix.ALWAYS}, {prefix.NOT_PREDICTED}"


def test_auto_is_compared_with_the_quicker_way_at_each_length_and_its_choices_are_counted(tmp_path: Path) -> None:
    auto = prefilled(
        "prefix_auto",
        (
            *(Prefilled(0.51, length, how, fetched=fetched) for length, how, fetched in [(0, "recompute", 0), (64, "fetch_blocks", 9)]),
            *(Prefilled(0.55, length, "recompute") for length in LENGTHS[1:]),
        ),
        **(KV | {"prefix": "auto"}),
    )
    table = table_of(tmp_path, *computes(0.5), *blocks((0.5, 0.45, 0.6, 0.9)), *auto)
    assert row_of(table, "prefix_auto", 64).ratio_to_better == pytest.approx(0.51 / 0.45)  # fetching
    assert row_of(table, "prefix_auto", 256).ratio_to_better == pytest.approx(0.55 / 0.5)  # computing
    assert (row_of(table, "prefix_auto", 64).fetch_requests, row_of(table, "prefix_auto", 256).recompute_requests) == (1, 1)
    assert row_of(table, "prefix_auto", 64).crossing_tokens_reason.startswith("auto takes either way")
    assert row_of(table, "prefix_blocks", 64).ratio_to_better_reason == "the mode does not choose"
    other = blocks((0.5, 0.45, 0.6, 0.9), mode="prefix_planes", codec=RAW | {"kv": "planes_zstd"})
    row = row_of(table_of(tmp_path / "other", *computes(0.5), *other, *auto), "prefix_auto", 64)
    assert row.ratio_to_better_reason.startswith("a mode that computes and one that fetches blocks in the same codec")


def test_prefix_phases_are_in_no_table_of_gaps_and_latencies_of_equal_work(tmp_path: Path) -> None:
    results = results_of(load(tmp_path, *computes(0.5), *blocks((0.5, 0.4, 0.3, 0.2))))
    assert alike(results.rows).empty and len(results.rows) == 2
    assert gap.table(results).empty and summary.table(results).empty


def test_the_figure_has_a_panel_for_each_network_and_marks_the_crossings(tmp_path: Path) -> None:
    fast = KV | {"network": "kv_fast", "network_spec": {"kind": "loopback", "kv": "fast"}}
    trials = [
        *computes(0.5, 0.52),
        *blocks((0.5, 0.45, 0.4, 0.8), (0.5, 0.45, 0.4, 0.82), predicted=(0.4, 0.45, 0.55)),
        *blocks((0.5, 0.4, 0.3, 0.2), (0.5, 0.4, 0.3, 0.21), **fast),
        *blocks((0.5, 0.6, 0.7, 0.8), (0.5, 0.6, 0.7, 0.9), mode="prefix_whole", prefix="fetch_whole"),
    ]
    figure = prefix_figure.plot(results_of(load(tmp_path, *trials)))
    assert {ax.get_title("left") for ax in figure.axes} == {"KV host over slow", "KV host over fast"}
    assert not unreadable_texts(figure)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["prefix_blocks", "prefix_whole", "computed (its mean)", "crossing", "crossing, predicted"]
    slow = next(ax for ax in figure.axes if ax.get_title("left") == "KV host over slow")
    assert sorted(line.get_xdata()[0] for line in slow.lines if line.get_marker() in ("x", "o") and line.get_linestyle() == "None") == [
        pytest.approx(160, abs=1),
        pytest.approx(192),
    ]


def test_a_run_without_prefixes_has_an_empty_table_and_a_figure_that_says_so(tmp_path: Path) -> None:
    results = results_of(load(tmp_path, Trial("remote_cache")))
    assert prefix.table(results).empty
    assert [text.get_text() for text in prefix_figure.plot(results).texts] == ["no prefix phase was run"]


def test_the_readable_table_names_its_link_and_gives_reasons(tmp_path: Path) -> None:
    table = table_of(tmp_path, *computes(0.5, 0.5), *blocks((0.5, 0.4, 0.3, 0.2), (0.5, 0.42, 0.3, 0.2)))
    page = to_markdown(table, prefix.VIEWS)
    assert "Link to the KV host, prefix_blocks: round trip 1.00 ms" in page
    assert "fetching is quicker at every length" in page and "the mode computes every prefix" in page
    assert to_latex(table, prefix.VIEWS).count("tabular") >= 3
