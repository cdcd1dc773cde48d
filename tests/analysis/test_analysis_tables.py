"""The tables summary and hypotheses, and the formats of all tables."""

import csv
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from rendered import columns, compiled, latex_faults
from written_trials import NO_GPU, RAW, SHRUNK, Trial, repeated, results

from semgap.analysis.tables import hypotheses, summary
from semgap.analysis.tables.answer import answer
from semgap.analysis.tables.make_tables import TABLES, TableModule, make_tables, name_of, write_table
from semgap.analysis.tables.page import to_html
from semgap.analysis.tables.render import Column, View, cell_text, to_latex, to_markdown


def test_summary_pairs_trials_of_one_session_with_both_baselines(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        *repeated("local", (50, 51, 52)),
        *repeated("remote_cache", (60, 61.2, 62.4)),
        *repeated("sys_simulated", (30, 30.6, 31.2), keeps="lossy"),
    )
    table = summary.table(found).set_index("mode")
    shrunk = table.loc["sys_simulated"]
    assert shrunk.ratio_to_base == pytest.approx(0.5)
    assert shrunk.ratio_to_base_low == pytest.approx(0.5)
    assert shrunk.ratio_to_local == pytest.approx(0.6)
    assert shrunk.ratio_to_local_pairs == 3
    assert (shrunk.latency_metric, shrunk.keeps, shrunk.trials) == ("ITL", "lossy", 3)
    assert shrunk.latency_mean_ms == pytest.approx(30.6)
    assert shrunk.latency_mean_ms_low < 30.6 < shrunk.latency_mean_ms_high
    assert pd.isna(shrunk.latency_median_ms_low)
    assert "75%" in shrunk.latency_median_ms_reason
    assert pd.isna(shrunk.ttft_ms)
    assert table.loc["local"].worker_reason.startswith("no worker")
    assert pd.isna(table.loc["remote_cache"].worker_reason)


def test_ttft_is_the_mean_over_prefills_as_every_table_takes_it(tmp_path: Path) -> None:
    row = summary.table(results(tmp_path, Trial("remote_cache", "prefill", latency_s=(0.05, 0.05, 0.11)))).iloc[0]
    assert row.ttft_ms == row.latency_mean_ms == pytest.approx(70)
    assert pd.isna(row.itl_ms)


def test_ratios_over_mixed_sessions_are_null_and_say_how_to_remeasure(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        *repeated("remote_cache", (60, 61, 62), session="s1"),
        *repeated("sys_simulated", (30, 31, 32), session="s2", codec=SHRUNK),
    )
    cell = summary.table(found).set_index("mode").loc["sys_simulated"]
    assert pd.isna(cell.ratio_to_base)
    assert "3 of 3 trials were measured in a different session" in cell.ratio_to_base_reason
    assert "--config remeasure=blocks" in cell.ratio_to_base_reason
    h2 = hypotheses.table(found).query("hypothesis == 'H2'").iloc[0]
    assert h2.verdict == "yes", "each trial's own ratio compares across sessions"
    h1 = hypotheses.table(found).query("hypothesis == 'H1'").iloc[0]
    assert h1.verdict == "no", "bytes compare across sessions"


@pytest.mark.parametrize(("latencies", "verdict"), [((45, 45.5, 45.2), "yes"), ((58, 58.4, 58.1), "no"), ((30, 51, 80), "inconclusive")])
def test_h2_follows_the_interval_of_paired_ratios(tmp_path: Path, latencies: tuple[float, ...], verdict: str) -> None:
    found = results(tmp_path, *repeated("remote_cache", (60, 60.6, 60.2)), *repeated("sys_simulated", latencies, codec=SHRUNK))
    h2 = hypotheses.table(found).query("hypothesis == 'H2'").iloc[0]
    assert h2.verdict == verdict
    assert h2.threshold == 0.15
    assert h2.cut_low <= h2.cut <= h2.cut_high


def test_h2_is_corrected_over_all_its_rows(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        *repeated("remote_cache", (60, 60.6, 60.2)),
        *repeated("sys_simulated", (45.0, 47.3, 46.1)),
        *repeated("sys", (40.0, 41.3, 40.1)),
    )
    one_mode = replace(found, rows=found.rows[found.rows["mode"] != "sys"], gaps=found.gaps[found.gaps["mode"] != "sys"])
    both, alone = (hypotheses.table(each).query("hypothesis == 'H2'").set_index("mode") for each in (found, one_mode))
    smaller, larger = both.sort_values("p").itertuples()
    assert smaller.p_holm == pytest.approx(2 * smaller.p)
    assert larger.p_holm == pytest.approx(max(larger.p, smaller.p_holm))
    assert alone.loc["sys_simulated"].p_holm == pytest.approx(alone.loc["sys_simulated"].p)


@pytest.mark.parametrize(("logits", "verdict"), [(80_000, "yes"), (190_000, "no")])
def test_h1_of_equal_bytes_is_exact(tmp_path: Path, logits: int, verdict: str) -> None:
    sizes = {"tokens": 8, "logits": logits}
    found = results(tmp_path, *repeated("remote_cache", (60, 61)), *repeated("sys_simulated", (60, 61), sizes=sizes))
    h1 = hypotheses.table(found).query("hypothesis == 'H1'").iloc[0]
    assert h1.verdict == verdict
    assert h1.cut == h1.cut_low == h1.cut_high == 1 - (logits + 78) / (196_608 + 78)


def test_h1_of_varying_bytes_has_a_t_interval_and_can_be_inconclusive(tmp_path: Path) -> None:
    varied = [Trial("sys_simulated", trial=n, sizes={"logits": s}) for n, s in ((1, 90_000), (2, 180_000), (3, 130_000))]
    h1 = hypotheses.table(results(tmp_path, *repeated("remote_cache", (60, 60, 60)), *varied)).query("hypothesis == 'H1'").iloc[0]
    assert h1.cut_low < 0.30 < h1.cut_high
    assert h1.verdict == "inconclusive"


def test_the_part_of_the_cut_by_the_cast_alone_is_stated(tmp_path: Path) -> None:
    halves = {"tokens": 8, "logits": 98_304}
    found = results(
        tmp_path,
        *repeated("remote_cache", (60, 60)),
        *repeated("remote_cache_fp16", (59, 59), sizes=halves),
        *repeated("sys_simulated", (70, 70), sizes={"tokens": 8, "logits": 80_000}),
    )
    h1 = hypotheses.table(found).query("hypothesis == 'H1'").iloc[0]
    assert h1.cast_part == pytest.approx(98_304 / 196_686)
    assert h1.rest_part == pytest.approx((98_304 - 80_000) / 196_686)


def test_without_the_cast_mode_its_part_is_null_with_the_reason(tmp_path: Path) -> None:
    table = hypotheses.table(results(tmp_path, *repeated("remote_cache", (60, 60)), *repeated("sys_simulated", (70, 70))))
    for row in table.query("mode == 'sys_simulated' and hypothesis != 'A/A'").itertuples():
        assert pd.isna(row.cast_part)
        assert pd.isna(row.rest_part)
        assert row.cast_reason == "remote_cache_fp16 was not run"


def test_without_remote_cache_every_verdict_is_null_with_the_reason(tmp_path: Path) -> None:
    table = hypotheses.table(results(tmp_path, *repeated("local", (60, 60)), *repeated("sys", (70, 70))))
    assert list(table["hypothesis"]) == ["H1", "H2"]
    assert table["verdict"].isna().all()
    assert set(table["cut_reason"]) == {"remote_cache was not run"}


def test_signed_percentages_have_two_digits_and_no_exponent() -> None:
    column = Column("error", "error (%)", "signed_percent")
    shown = [cell_text({"error": value}, column) for value in (0.0, 0.00123, -0.0456, 0.123, 0.999, -3.12, 123.4)]
    assert shown == ["0", "+0.12", "-4.6", "+12", "+100", "-312", "+12,340"]


def test_csv_and_parquet_are_unrounded_and_null_is_not_zero(tmp_path: Path) -> None:
    frame = pd.DataFrame({"mode": ["a", "b"], "latency_ms": [1 / 3, None], "latency_ms_reason": [None, "not run"]})
    paths = write_table(frame, tmp_path / "tables" / "t", ())
    assert [path.name for path in paths] == ["t.csv", "t.parquet", "t.html", "t.md", "t.tex"]
    with paths[0].open(newline="") as file:
        assert [row["latency_ms"] for row in csv.DictReader(file)] == [repr(1 / 3), ""]
    assert pq.read_table(paths[1])["latency_ms"].to_pylist() == [1 / 3, None]


def test_readable_tables_have_separators_intervals_and_numbered_reasons() -> None:
    frame = pd.DataFrame(
        {
            "mode": ["remote_cache", "sys"],
            "size": [1_234_567.8, 10.0],
            "ratio": [0.12345, None],
            "ratio_low": [0.1, None],
            "ratio_high": [0.15, None],
            "why": [None, "50% & not run"],
        }
    )
    columns = (Column("mode", "mode"), Column("size", "size (B)", "count"), Column("ratio", "ratio", "ratio", reason="why"))
    view = View("Sizes", columns, by=())
    markdown = to_markdown(frame, [view])
    assert "| remote_cache | 1,234,568 | 0.123 [0.100 to 0.150] |" in " ".join(markdown.split())
    assert "null (1)" in markdown
    assert "(1) 50% & not run" in markdown
    latex = to_latex(frame, [view])
    assert r"remote\_cache & 1,234,568 & 0.123 [0.100 to 0.150] \\" in latex
    assert r"(1) 50\% \& not run" in latex


@pytest.mark.parametrize("table", TABLES, ids=name_of)
def test_a_readable_table_has_at_most_eight_columns_with_short_headings_that_differ(table: TableModule) -> None:
    for view in table.VIEWS:
        labels = [column.label for column in view.columns]
        assert len(labels) <= 8, view.title
        assert len(set(labels)) == len(labels) and all(0 < len(label) <= 23 for label in labels), view.title


def test_all_three_readable_forms_have_the_same_tables(tmp_path: Path) -> None:
    found = results(tmp_path, *repeated("local", (50, 51)), *repeated("remote_cache", (60, 61)), *repeated("sys", (55, 56)))
    make_tables(found, tmp_path / "tables")
    shapes = {form: [columns(path) for path in sorted((tmp_path / "tables").glob(f"*.{form}"))] for form in ("html", "md", "tex")}
    assert shapes["html"] == shapes["md"] == shapes["tex"]
    assert len(shapes["md"]) == len(TABLES) and sum(map(len, shapes["md"])) > 10
    assert [fault for path in (tmp_path / "tables").glob("*.tex") for fault in latex_faults(path.read_text())] == []


def test_pdflatex_compiles_every_table_with_all_its_columns_notes_and_reasons(tmp_path: Path) -> None:
    signs = "a|b_c & 5% <i> #1 {x} ~ ^ $ \\ -0.5 [-1 to 2]"
    views = [(name_of(table), view) for table in TABLES for view in table.VIEWS]
    texts = {f"{name}-{number}": to_latex(_filled(view, signs), (view,)) for number, (name, view) in enumerate(views)}
    assert all(rf"\caption{{{view.title}" in text for (_, view), text in zip(views, texts.values(), strict=True))
    log = compiled(tmp_path, texts)
    assert "Overfull" not in log, "no table is wider than the line"


def _filled(view: View, text: str) -> pd.DataFrame:
    """Two rows that fill a view: a number with its interval, and a null with its reason."""
    rows: dict[str, list[object]] = {name: [text, text] for name in (*view.by, *view.notes)}
    for column in view.columns:
        numbers = {column.source: [-1234.5, None], f"{column.source}_low": [-2345.6, None], f"{column.source}_high": [1.5, None]}
        rows |= numbers if column.numeric else {column.source: [text, None]}
        rows |= {column.reason: [None, f"{text} {column.source}"]} if column.reason else {}
    return pd.DataFrame(rows | ({view.only[0]: [view.only[1][0]] * 2} if view.only else {}))


def test_signs_of_a_language_are_escaped_in_each_form() -> None:
    signs = "a|b_c & 5% <i> #1 {x} ~ ^ $ \\ -0.5 [-1 to 2]"
    view = View(signs, (Column("mode", "mode"), Column("cut", "cut (%)", "ratio")), signs, by=())
    frame = pd.DataFrame({"mode": [signs], "cut": [-0.5], "cut_low": [-1.0], "cut_high": [2.0]})
    latex = to_latex(frame, [view])
    assert latex_faults(latex) == [] and "$-$0.500 [$-$1.000 to 2.000]" in latex
    assert r"a\|b_c" in to_markdown(frame, [view])
    html = to_html(frame, [view], "<b>").partition("<h1>")[2].partition("<script")[0]
    assert "<i>" not in html and "<b>" not in html and html.count("&lt;i&gt;") == 5, "contents, heading, region, cell, note"


def test_rows_without_a_value_for_their_block_are_shown_too() -> None:
    frame = pd.DataFrame({"mode": ["a", "b"], "from_networks": ["near", None]})
    view = View("Priced", (Column("mode", "mode"),), by=("from_networks",))
    lines = [" ".join(line.split()) for line in to_markdown(frame, (view,)).splitlines()]
    assert [line for line in lines if line.startswith(("###", "| a", "| b"))] == [
        *("### Priced: from networks near", "| a |", "### Priced", "| b |")
    ]


def test_an_empty_table_is_written_in_all_formats(tmp_path: Path) -> None:
    paths = make_tables(results(tmp_path, Trial("local")), tmp_path / "tables", [hypotheses])
    assert paths[3].read_text() == "No rows.\n"
    assert "<p>No rows.</p>" in paths[2].read_text()
    assert "verdict" in paths[0].read_text()


def test_the_readable_summary_has_a_block_for_each_phase(tmp_path: Path) -> None:
    found = results(tmp_path, *repeated("local", (60, 61)), *repeated("local", (200, 210), phase="prefill"))
    markdown = to_markdown(summary.table(found), summary.VIEWS)
    assert "phase prefill, latency metric TTFT" in markdown
    assert "phase decode, latency metric ITL" in markdown
    assert NO_GPU in markdown


def test_uploads_are_means_of_trials_that_began_with_an_empty_cache(tmp_path: Path) -> None:
    uploaded = Trial("remote_cache", trial=1, uploads=(500_000_000,), held=(0,))
    held = [Trial("remote_cache", trial=number, uploads=(0,), held=(500_000_000,)) for number in (2, 3)]
    found = results(tmp_path, uploaded, *held)
    assert found.rows["weights_put_mb_per_s"].isna().tolist() == [False, True, True]
    assert found.rows["weights_put_reason"].tolist()[1:] == ["held by the worker's cache"] * 2
    row = summary.table(found).iloc[0]
    assert (row["weights_bytes"], row["weights_put_mb_per_s"]) == (500_000_000, 2500.0)
    assert pd.isna(row["weights_reason"])
    alone = summary.table(replace(found, rows=found.rows[found.rows["trial"] > 1])).iloc[0]
    assert pd.isna(alone["weights_bytes"]) and pd.isna(alone["setup_payload_bytes"]) and pd.isna(alone["weights_put_mb_per_s"])
    assert alone["weights_reason"] == "held by the worker's cache" and alone["weights_held_bytes"] == 500_000_000


def test_weights_that_the_trial_itself_gave_the_worker_are_no_figures_of_its_mode(tmp_path: Path) -> None:
    uploaded = Trial("remote_cache", trial=1, uploads=(500_000_000,), held=(0,))
    rows = results(tmp_path, uploaded, Trial("remote_cache", trial=2, uploads=(0,), held=(500_000_000,), held_before=True)).rows
    upload = ["weights_upload_s", "weights_put_s", "weights_bytes", "weights_held_bytes", "worker_weight_store_bytes"]
    assert rows.loc[0, upload[:3]].notna().all() and rows.loc[1, upload].isna().all()
    assert rows.loc[1, "weights_put_reason"] == "not measured again: the trial itself made the worker hold the weights first"
    assert rows["cached_weights_bytes"].tolist() == [0, 500_000_000]


def test_bytes_that_depend_on_random_weights_are_marked_and_have_no_verdict(tmp_path: Path) -> None:
    zlib = RAW | {"reply": "fp16_zlib"}
    found = results(
        tmp_path,
        *(Trial("remote_cache", trial=n, source="random") for n in (1, 2)),
        *(Trial("sys_simulated", trial=n, source="random", codec=zlib, sizes={"tokens": 8, "logits": 50_000}) for n in (1, 2)),
    )
    marked = dict(zip(found.rows["mode"], found.rows["ratios_reason"], strict=True))
    assert pd.isna(marked["remote_cache"]) and "random" in marked["sys_simulated"]
    assert "\nB/token of sys_simulated: not meaningful: the weights are random numbers\n" in answer(found)
    table = summary.table(found).set_index("mode")["ratios_reason"]
    assert pd.isna(table["remote_cache"]) and "not meaningful" in table["sys_simulated"]
    h1 = hypotheses.table(found).set_index("hypothesis").loc["H1"]
    assert h1["cut"] > 0 and pd.isna(h1["verdict"]) and "not meaningful" in h1["cut_reason"]
