"""Intervals, paired ratios and Holm's correction, against published or hand-computed values."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semgap.analysis.stats import geometric_mean_interval, holm, mean_interval, median_interval, p_mean_below, paired_ratio


def trials(latencies_s: list[float], session: str = "s", fingerprint: str = "f", first: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        {"trial": range(first, first + len(latencies_s)), "session": session, "fingerprint": fingerprint, "latency_mean_s": latencies_s}
    )


def test_the_t_interval_of_three_values_is_the_textbooks() -> None:
    # t(0.975, 2) = 4.302653; s = 1; half width 4.302653 / sqrt(3).
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.value == 2
    assert interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_equal_values_have_an_interval_without_width() -> None:
    interval = mean_interval([0.1, 0.1, 0.1])
    assert (interval.value, interval.low, interval.high) == (0.1, 0.1, 0.1)


def test_one_value_has_no_interval_and_says_why() -> None:
    interval = mean_interval([5.0])
    assert (interval.value, interval.low, interval.high) == (5.0, None, None)
    assert "set trials to 2 or more" in str(interval.reason)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_what_was_not_measured_has_no_mean(values: list[float]) -> None:
    assert mean_interval(values).value is None
    assert median_interval(values).value is None
    assert mean_interval(values).reason


def test_the_geometric_interval_is_symmetric_on_the_log_scale() -> None:
    interval = geometric_mean_interval([1.0, 10.0, 100.0])
    assert interval.value == pytest.approx(10)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low > 0
    assert interval.low * interval.high == pytest.approx(100)


def test_the_median_of_few_values_has_no_interval_and_says_what_their_range_covers() -> None:
    interval = median_interval([3.0, 1.0, 2.0])
    assert (interval.value, interval.low, interval.high) == (2, None, None)
    assert "the range of 3 covers 75%" in str(interval.reason)


@pytest.mark.parametrize(("n", "ends"), [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15))])
def test_the_median_interval_takes_the_tabulated_order_statistics(n: int, ends: tuple[int, int]) -> None:
    interval = median_interval([float(x) for x in range(1, n + 1)])
    assert (interval.low, interval.high) == ends


def test_holm_gives_the_published_example() -> None:
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and Wikipedia's four p values.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    ranked = [adjusted[i] for i in np.argsort(p_values, kind="stable")]
    assert ranked == sorted(ranked)


def test_a_constant_factor_between_paired_trials_is_found_exactly() -> None:
    ratio = paired_ratio(trials([0.03, 0.06, 0.045]), trials([0.02, 0.04, 0.03]))
    assert ratio.value == pytest.approx(1.5)
    assert ratio.low == pytest.approx(1.5)
    assert ratio.n == 3
    assert ratio.reason is None


def test_trials_of_other_sessions_do_not_pair() -> None:
    ratio = paired_ratio(trials([1, 2, 3], session="a"), trials([1, 2, 3], session="b"))
    assert ratio.value is None
    assert "different session" in str(ratio.reason)
    assert "--config remeasure=blocks" in str(ratio.reason)


def test_trials_of_other_environments_do_not_pair() -> None:
    ratio = paired_ratio(trials([1, 2], fingerprint="a"), trials([1, 2], fingerprint="b"))
    assert ratio.value is None
    assert "different environment" in str(ratio.reason)


def test_a_single_pair_has_a_ratio_without_an_interval() -> None:
    ratio = paired_ratio(trials([1.0]), trials([2.0]))
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (pytest.approx(0.5), None, None, 1)
    assert "set trials to 2 or more" in str(ratio.reason)


def test_trials_that_found_no_partner_are_reported_beside_the_ratio() -> None:
    mixed = pd.concat([trials([1.0, 2.0]), trials([3.0], session="other", first=3)])
    ratio = paired_ratio(mixed, trials([1.0, 2.1, 3.0]))
    assert ratio.n == 2
    assert ratio.value is not None
    assert "1 of 3 trials" in str(ratio.reason)


def test_the_one_sided_p_value_is_students() -> None:
    # t = (2 - 3) / (1 / sqrt(3)) = -1.732051, df = 2: p = 0.112702.
    assert p_mean_below([1.0, 2.0, 3.0], 3.0) == pytest.approx(0.112702, abs=1e-6)
    assert p_mean_below([1.0, 2.0, 3.0], 1.0) == pytest.approx(1 - 0.112702, abs=1e-6)


@pytest.mark.parametrize(("bound", "p"), [(2.0, 0.0), (1.0, 0.5), (0.0, 1.0)])
def test_equal_values_leave_no_doubt(bound: float, p: float) -> None:
    assert p_mean_below([1.0, 1.0], bound) == p


@given(st.lists(st.floats(1e-4, 10), min_size=2, max_size=12))
def test_intervals_hold_their_estimate(values: list[float]) -> None:
    for interval in (mean_interval(values), geometric_mean_interval(values)):
        assert interval.value is not None
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low <= interval.value * (1 + 1e-12)
        assert interval.value <= interval.high * (1 + 1e-12)
