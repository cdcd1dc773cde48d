"""What a trial's surroundings did to it."""

from __future__ import annotations

import pyarrow as pa
import pytest

from semgap.client.report import Measured
from semgap.experiment.trial_faults import steal_share

SAMPLES = pa.Table.from_pylist(
    [
        {"t_s": float(t), "side": side, "steal_s": stolen}
        for t, stolen in enumerate((0.0, 1.0, 1.5, 2.0, 9.0))
        for side in ("client", "worker")
    ]
)


def test_the_stolen_share_is_of_all_cores_over_the_samples_of_the_measured_requests() -> None:
    assert steal_share(SAMPLES, Measured(0.5, 3.5), cpus=2) == pytest.approx((2.0 - 1.0) / 2 / 2)


def test_without_two_samples_among_the_measured_requests_the_stolen_share_is_unknown() -> None:
    assert steal_share(SAMPLES, Measured(0.5, 1.5), cpus=2) is None
    assert steal_share(SAMPLES.slice(0, 0), Measured(0.5, 3.5), cpus=2) is None
