"""The dmon parser, on recorded H100 output and on made-up headers."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semgap.telemetry.dmon import DmonFormatError, DmonParser, parse_header, table_columns
from semgap.telemetry.dmon_process import DmonLines
from semgap.telemetry.samples import Row

DATA = Path(__file__).parents[1] / "data"
NAMES_AND_UNITS = {
    "gpu": "Idx", "pwr": "W", "gtemp": "C", "sm": "%", "mem": "%", "ofa": "%", "mclk": "MHz",
    "fb": "MB", "sbecc": "errs", "rxpci": "MB/s", "newmetric": "furlongs",
}  # fmt: skip


def _parsed(lines: Iterable[str]) -> list[Row]:
    parser = DmonParser()
    return [row for line in lines if (row := parser.feed(line)) is not None]


def test_sm_of_dmon_u_is_the_column_named_sm_and_not_the_last_one() -> None:
    rows = _parsed((DATA / "dmon_h100_u.txt").read_text().splitlines())
    assert len(rows) == 56
    assert [row["sm_percent"] for row in rows[:5]] == [0, 0, 7, 39, 0]
    assert [row["sm_percent"] for row in rows[13:20]] == [12, 28, 24, 21, 22, 22, 17]
    assert rows[14] == {
        "gpu_index": 0,
        "sm_percent": 28.0,
        "memory_controller_percent": 12.0,
        "encoder_percent": 0.0,
        "decoder_percent": 0.0,
        "jpeg_percent": 0.0,
        "optical_flow_percent": 0.0,
    }


def test_a_line_of_the_recorded_pucvmet_output_has_each_value_under_its_own_name() -> None:
    rows = _parsed((DATA / "dmon_h100_pucvmet.txt").read_text().splitlines())
    assert len(rows) == 38
    assert rows[1] == {
        "date": "20261123",
        "time": "03:30:51",
        "gpu_index": 0,
        "power_w": 127.0,
        "temperature_c": 40.0,
        "memory_temperature_c": 42.0,
        "sm_percent": 0.0,
        "memory_controller_percent": 0.0,
        "encoder_percent": 0.0,
        "decoder_percent": 0.0,
        "jpeg_percent": 0.0,
        "optical_flow_percent": 0.0,
        "memory_clock_mhz": 2619.0,
        "processor_clock_mhz": 1980.0,
        "power_violation_percent": 0.0,
        "thermal_violation_bool": 0.0,
        "framebuffer_mb": 8721.0,
        "bar1_mb": 8722.0,
        "protected_memory_mb": 0.0,
        "single_bit_ecc_errors": 0.0,
        "double_bit_ecc_errors": 0.0,
        "pcie_replay_errors": 0.0,
        "pcie_rx_mb_per_s": 22660.0,
        "pcie_tx_mb_per_s": 5122.0,
    }
    assert (rows[14]["power_w"], rows[14]["sm_percent"], rows[14]["framebuffer_mb"]) == (208, 25, 12387)


def test_the_recorded_columns_are_the_schema_of_a_run_without_a_gpu() -> None:
    header = (DATA / "dmon_h100_pucvmet.txt").read_text().splitlines()[:2]
    names = [column.name for column in table_columns()]
    assert names == ["t_s", *(column.key for column in parse_header(*header) if column.key not in ("date", "time"))]
    assert {column.kind for column in table_columns() if column.name != "gpu_index"} == {"float64"}


@given(
    order=st.permutations(sorted(NAMES_AND_UNITS)),
    width=st.integers(1, len(NAMES_AND_UNITS)),
    samples=st.lists(
        st.lists(st.none() | st.integers(0, 99999), min_size=len(NAMES_AND_UNITS), max_size=len(NAMES_AND_UNITS)), min_size=1, max_size=4
    ),
    repeat_header=st.booleans(),
)
def test_any_set_of_columns_in_any_order_gives_each_name_its_own_value(
    order: list[str], width: int, samples: list[list[int | None]], repeat_header: bool
) -> None:
    names = order[:width]
    header = ["#" + " ".join(f"{name:>9}" for name in names), "# " + " ".join(NAMES_AND_UNITS[name] for name in names)]
    lines: list[str] = []
    for number, sample in enumerate(samples):
        lines += header if number == 0 or repeat_header else []
        lines.append(" ".join("-" if value is None else str(value) for value in sample[:width]))
    keys = {column.name: column.key for column in parse_header(*header)}
    rows = _parsed(lines)
    assert [[row[keys[name]] for name in names] for row in rows] == [sample[:width] for sample in samples]


def test_a_header_repeated_with_other_columns_holds_from_there_on() -> None:
    rows = _parsed(["# gpu sm", "# Idx %", "0 40", "# gpu fb sm", "# Idx MB %", "0 512 50"])
    assert [row["sm_percent"] for row in rows] == [40, 50]
    assert rows[1]["framebuffer_mb"] == 512


def test_a_dash_is_null_and_not_zero() -> None:
    assert _parsed(["# gpu mtemp sm", "# Idx C %", "0 - 0"]) == [{"gpu_index": 0, "memory_temperature_c": None, "sm_percent": 0.0}]


def test_an_unknown_column_keeps_its_own_name_and_unit() -> None:
    columns = parse_header("# gpu nvlrx", "# Idx GB/s")
    assert [column.key for column in columns] == ["gpu_index", "nvlrx_gb_per_s"]
    assert table_columns(columns)[-1].name == "nvlrx_gb_per_s"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["# gpu sm", "# Idx %", "0 1 2"], "3 fields under a header of 2 columns: '0 1 2'"),
        (["# gpu sm", "# Idx %", "0"], "1 fields under a header of 2 columns"),
        (["0 1"], "data before the header"),
        (["# gpu sm", "0 1"], "data before the header"),
        (["# gpu sm", "# Idx"], "header has 2 names, but its line of units has 1"),
        (["# sm sm", "# % %"], "header gives a column twice"),
        (["# gpu sm", "# Idx %", "0 busy"], "column 'sm' holds 'busy'"),
    ],
)
def test_a_line_that_its_header_does_not_explain_is_refused(lines: list[str], problem: str) -> None:
    with pytest.raises(DmonFormatError, match=problem.replace("(", r"\(")):
        _parsed(lines)


def test_a_stream_goes_on_after_a_refused_line() -> None:
    parser = DmonParser()
    assert [parser.feed(line) for line in ("# gpu sm\n", "# Idx %\n")] == [None, None]
    with pytest.raises(DmonFormatError):
        parser.feed("0\n")
    assert parser.feed("0 7\n") == {"gpu_index": 0, "sm_percent": 7.0}


@given(cuts=st.lists(st.integers(0, 2940), max_size=8))
def test_lines_cut_anywhere_by_the_terminal_are_the_same_samples(cuts: list[int]) -> None:
    data = (DATA / "dmon_h100_u.txt").read_bytes()
    edges = [0, *sorted(cuts), len(data)]
    lines = DmonLines()
    for start, end in itertools.pairwise(edges):
        lines.feed(data[start:end], 1.0)
    whole = _parsed(data.decode().splitlines())
    assert [{key: value for key, value in row.items() if key != "t_s"} for row in lines.rows] == whole
    assert not lines.problems
