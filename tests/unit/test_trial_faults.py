"""What a trial's surroundings did to it."""

from __future__ import annotations

import pyarrow as pa
import pytest

from semgap.client.report import LoadLevel, Measured
from semgap.experiment.trial_faults import faults_of, late_faults, steal_share
from semgap.network.spec import Network

SAMPLES = pa.Table.from_pylist(
    [
        {"t_s": float(t), "side": side, "steal_s": stolen}
        for t, stolen in enumerate((0.0, 1.0, 1.5, 2.0, 9.0))
        for side in ("client", "worker")
    ]
)


LINK = Network("relay", rtt_ms=10, rate="1Gbit")
PROBE = {"rtt_s": 0.0101, "payload_bytes": 1 << 24, "round_trips": 20} | dict.fromkeys(
    ("goodput_up_bytes_per_s", "goodput_down_bytes_per_s", "cold_up_bytes_per_s", "cold_down_bytes_per_s"), 1.17e8
)


@pytest.mark.parametrize(
    ("link", "late_s", "fault"),
    [
        (Network("relay", rtt_ms=20, rate="1Gbit"), 0.001, "far: the link's round trip is 10.100 ms, the config asks for 20 ms"),
        (Network("relay", rtt_ms=10, rate="2Gbit"), 0.001, "far: the link's goodput up is "),
        (LINK, 0.002, "far: the relay was late: of 9 sends up "),
        (LINK, 0.001, None),
    ],
)
def test_a_link_that_is_not_as_asked_or_whose_relay_was_late_is_a_fault_by_its_name(
    link: Network, late_s: float, fault: str | None
) -> None:
    relay = {"measured_lateness": {"up": {"sends": 9, "p95_s": late_s}}}
    found = list(faults_of("far", link, PROBE, relay))
    assert len(found) == (fault is not None) and all(text.startswith(fault or "") for text in found)


def test_the_stolen_share_is_of_all_cores_over_the_samples_of_the_measured_requests() -> None:
    assert steal_share(SAMPLES, Measured(0.5, 3.5), cpus=2) == pytest.approx((2.0 - 1.0) / 2 / 2)


def test_without_two_samples_among_the_measured_requests_the_stolen_share_is_unknown() -> None:
    assert steal_share(SAMPLES, Measured(0.5, 1.5), cpus=2) is None
    assert steal_share(SAMPLES.slice(0, 0), Measured(0.5, 3.5), cpus=2) is None


@pytest.mark.parametrize(("late_s", "faults"), [(0.009, 0), (0.011, 1)])
def test_a_level_whose_requests_were_sent_late_is_a_fault_of_the_surroundings(late_s: float, faults: int) -> None:
    level = LoadLevel(2, 4, None, None, 0, 1, 8, 64, (32, 32), 3, 3, 1, 1, 64, 0.1, late_p95_s=late_s, late_max_s=1.0)
    found = list(late_faults([level]))
    assert len(found) == faults and all("late in level 2: more than 5% of its requests by over 10 ms" in text for text in found)
