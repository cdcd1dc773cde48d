"""Lists and ranges of links."""

import pytest

from semgap.analysis.explorer.prices import RATES, RTTS_MS
from semgap.analysis.link_grid import LINK_COLUMNS, LinkGrid
from semgap.analysis.links import LinkModel


def rtts(texts: str) -> list[str]:
    return list(LinkGrid.parsed(texts, "1Gbit").rtt_ms)


def rates(texts: str) -> list[str]:
    return list(LinkGrid.parsed("1ms", texts).rate_mbit_per_s)


def test_a_range_has_both_ends_and_the_preferred_values_between_them() -> None:
    assert rtts("0.2ms..4ms") == ["0.2ms", "0.3ms", "0.5ms", "0.7ms", "1ms", "1.5ms", "2ms", "3ms", "4ms"]
    assert rates("250Mbit..2Gbit") == ["250Mbit", "300Mbit", "500Mbit", "700Mbit", "1Gbit", "2Gbit"]
    assert rtts("800us..2ms") == ["800us", "1ms", "1.5ms", "2ms"]
    assert rates("700kbit..1Mbit") == ["700kbit", "1Mbit"]


def test_values_and_ranges_mix_and_equal_values_count_once() -> None:
    assert rtts("10ms, 0.2ms,1ms..2ms,1000us, 2ms..2ms") == ["10ms", "0.2ms", "1ms", "1.5ms", "2ms"]
    assert rates("1Gbit/s,1000Mbit") == ["1Gbit/s"]


def test_each_round_trip_meets_each_rate() -> None:
    grid = LinkGrid.parsed("25ms,50us", "400Mbit,2Gbit")
    (first, model), *_, (last, _) = grid.links()
    assert first == dict(zip(LINK_COLUMNS, ("25ms", "400Mbit", pytest.approx(25), pytest.approx(400)), strict=True))
    assert model == LinkModel.parsed("25ms", "400Mbit")
    assert tuple(last[name] for name in LINK_COLUMNS) == ("50us", "2Gbit", pytest.approx(0.05), pytest.approx(2000))
    assert len(grid) == len(list(grid.links())) == 4


def test_the_explorers_sliders_are_ranges() -> None:
    assert (RTTS_MS[0], RTTS_MS[-1], len(RTTS_MS)) == (pytest.approx(0.05), pytest.approx(200), 23)
    assert (RATES[0], RATES[-1], len(RATES)) == ("10Mbit", "400Gbit", 24)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("10ms..1ms", "round trip range '10ms..1ms' falls; write 1ms..10ms"),
        ("1ms,,2ms", "list of round trips '1ms,,2ms' has an empty item; write values and ranges, e.g. 0.2ms,1ms..50ms"),
        ("", "list of round trips '' has an empty item"),
        ("1ms..", "round trip range '1ms..' is not two values with .. between them"),
        ("1ms..2ms..3ms", "round trip range '1ms..2ms..3ms' is not two values with .. between them"),
        ("0.2..10ms", "round trip range '0.2..10ms': round trip '0.2' is no number with a unit; use us, ms or s"),
        ("1ms..1Gbit", "round trip range '1ms..1Gbit': round trip '1Gbit' is no number with a unit; use us, ms or s"),
        ("0ms..1ms", "round trip range '0ms..1ms' begins at 0, which a log scale lacks; begin above 0"),
        ("25", "round trip '25' is no number with a unit; use us, ms or s"),
    ],
)
def test_a_wrong_list_of_round_trips_is_named_with_the_way_out(texts: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        rtts(texts)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("10Gbit..1Mbit", "rate range '10Gbit..1Mbit' falls; write 1Mbit..10Gbit"),
        ("1Gbit,", "list of rates '1Gbit,' has an empty item; write values and ranges, e.g. 50Mbit,100Mbit..10Gbit"),
        ("1Gbit..5ms", "rate range '1Gbit..5ms': rate '5ms' is not a number above 0 with one of bit, kbit, Mbit, Gbit"),
        ("0Mbit..1Gbit", "rate range '0Mbit..1Gbit': rate '0Mbit' is not a number above 0"),
    ],
)
def test_a_wrong_list_of_rates_is_named_with_the_way_out(texts: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        rates(texts)
    assert str(error.value).startswith(message)
