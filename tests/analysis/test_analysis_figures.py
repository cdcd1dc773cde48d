"""The figures bytes_per_token, latency and telemetry."""

from pathlib import Path

from figure_texts import texts, unreadable_texts
from matplotlib.markers import CARETLEFT, CARETRIGHT
from written_trials import NO_GPU, Trial, load, repeated, results

from semgap.analysis.figures import bytes_per_token, latency, telemetry
from semgap.analysis.figures.bytes_per_token import bytes_by_class
from semgap.analysis.figures.style import save
from semgap.analysis.tables import hypotheses, ladder, summary
from semgap.analysis.tables.make_tables import make_tables


def test_equal_trials_give_equal_bytes_in_every_table_and_figure(tmp_path: Path) -> None:
    found = results(tmp_path, *repeated("local", (60, 61, 62)), *repeated("remote_cache", (61, 62, 61)))
    written = []
    for attempt in ("a", "b"):
        paths = make_tables(found, tmp_path / attempt, [summary, ladder, hypotheses])
        for number, figure in enumerate((bytes_per_token, latency, telemetry)):
            paths += save(figure.plot(found), tmp_path / attempt / str(number))
        written.append({path.name: path.read_bytes() for path in paths})
    assert written[0] == written[1]
    assert len(written[0]) == 3 * 5 + 3 * 3


def test_bytes_by_class_come_from_the_clients_network_rows_of_measured_steps(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache", delta_bytes=400), Trial("local"))
    table = bytes_by_class(trials).set_index(["mode", "tensor_class"])["bytes_per_token"]
    assert table["remote_cache"].to_dict() == {"header": 70, "kv": 100, "logits": 196_608, "tokens": 8}
    assert table["local"].tolist() == [0]


def test_no_bytes_are_marked_as_0_on_the_log_axis(tmp_path: Path) -> None:
    shown = texts(bytes_per_token.plot(results(tmp_path, Trial("local"), Trial("remote_cache"))))
    assert {"0 B", "0", "197 kB"} <= set(shown)


def test_a_mode_that_was_not_run_in_a_phase_says_so(tmp_path: Path) -> None:
    found = results(tmp_path, Trial("local"), Trial("local", phase="prefill"), Trial("naive"))
    assert "not run" in texts(bytes_per_token.plot(found))
    assert "not run" in texts(latency.plot(found))


def test_slow_modes_get_a_separate_axis(tmp_path: Path) -> None:
    fast, slow = latency.plot(results(tmp_path, *repeated("local", (60, 61)), *repeated("naive", (1200, 1210)))).axes
    assert fast.get_xlim()[1] < 100
    assert slow.get_xlim()[0] > 500


def test_slow_modes_get_a_separate_axis_even_if_intervals_reach_far(tmp_path: Path) -> None:
    """With two trials the intervals of both reach half way towards each other and more."""
    fast, slow = latency.plot(results(tmp_path, *repeated("local", (60, 110)), *repeated("naive", (500, 700)))).axes
    assert fast.get_xlim()[1] < 300 < 400 > slow.get_xlim()[0]


def test_an_interval_beyond_the_axis_ends_in_an_arrow(tmp_path: Path) -> None:
    (ax,) = latency.plot(results(tmp_path, *repeated("local", (60, 90)), *repeated("remote_cache", (60, 61)))).axes
    assert {CARETLEFT, CARETRIGHT} <= {line.get_marker() for line in ax.lines}


def test_telemetry_names_the_reason_for_missing_gpu_samples(tmp_path: Path) -> None:
    shown = texts(telemetry.plot(results(tmp_path, Trial("local"), Trial("remote_cache"))))
    assert any(NO_GPU in text for text in shown)
    assert "GPU power (W)" not in shown


def test_telemetry_has_gpu_panels_if_there_are_samples(tmp_path: Path) -> None:
    shown = texts(telemetry.plot(results(tmp_path, Trial("remote_cache", gpu_percent=(10, 20, 30)), Trial("local"))))
    assert {"GPU power (W)", "no samples"} <= set(shown)


def test_every_telemetry_line_lies_within_its_axis(tmp_path: Path) -> None:
    figure = telemetry.plot(results(tmp_path, Trial("local"), Trial("remote_cache")))
    lines = [(ax.get_ylim(), line.get_ydata()) for ax in figure.axes for line in ax.lines]
    assert sum(len(values) > 0 for _, values in lines) == 6, "CPU and RSS of local's client and of both sides"
    assert all(low <= value <= high for (low, high), values in lines for value in values)


def test_no_texts_overlap_even_with_modes_decades_apart(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        *repeated("local", (60.3, 61, 62)),
        *repeated("naive", (1200, 1210, 1290)),
        *repeated("sys", (3, 3.2, 3.1)),
        *repeated("remote_cache_with_a_rather_long_name", (61, 62, 99)),
        *repeated("local", (310, 300, 305), phase="prefill"),
    )
    for figure in (latency.plot(found), bytes_per_token.plot(found), telemetry.plot(found)):
        assert unreadable_texts(figure) == []
