"""GPU performance monitoring (GPM): NVML's counters over the time between two samples.

NVML's "GPU util" is the part of time in which any kernel ran. GPM counts how much of the chip was in use. Hopper and newer GPUs have
it. Units are those of `nvml.h`: percent of the maximum, and MiB/s over PCIe.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from semgap.telemetry.samples import Column, Value

MIN_WINDOW_S = 0.09
"""Shortest time between two samples, in seconds: each tick of the usual 0.1 s. Earlier ticks read nothing."""

WINDOW = "gpm_window_s"
METRICS: Mapping[str, tuple[str, str]] = {
    "gpm_sm_activity_percent": ("SM_UTIL", "part of the SMs' time in which a warp was resident, mean over all SMs"),
    "gpm_sm_occupancy_percent": ("SM_OCCUPANCY", "resident warps over the most that fit, mean over all SMs"),
    "gpm_tensor_activity_percent": ("ANY_TENSOR_UTIL", "part of the SMs' time in which tensor cores worked"),
    "gpm_dram_bandwidth_percent": ("DRAM_BW_UTIL", "device memory traffic over the most that the memory can carry"),
    "gpm_pcie_tx_mib_per_s": ("PCIE_TX_PER_SEC", "PCIe, device to host"),
    "gpm_pcie_rx_mib_per_s": ("PCIE_RX_PER_SEC", "PCIe, host to device"),
}
"""Column -> name of the metric in NVML after NVML_GPM_METRIC_, and its meaning."""

COLUMNS = (
    Column(WINDOW, "float64", "time before t_s that the GPM columns cover; null in the first row"),
    *(Column(name, "float64", meaning) for name, (_, meaning) in METRICS.items()),
)


class NoGpm(RuntimeError):
    """This device has no GPM; the message says why."""


def require_gpm(nvml: Any, gpu: Any) -> None:
    """NoGpm if the device or its driver has none."""
    try:
        if not nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice:
            raise NoGpm("this GPU has no GPM (Hopper and newer have)")
    except nvml.NVMLError_FunctionNotFound as error:
        raise NoGpm(f"this driver has no GPM: {error}") from error
    except nvml.NVMLError as error:
        raise NoGpm(f"GPM: {error}") from error


class GpmReader:
    """Reads one GPU's GPM metrics. NoGpm if it has none. `null_reasons` holds the last reason per column.

    Holds two NVML sample objects and overwrites the older each time; `close` frees them.
    """

    def __init__(self, nvml: Any, gpu: Any) -> None:
        require_gpm(nvml, gpu)
        self._nvml, self._gpu = nvml, gpu
        self._query = _query(nvml)
        self._older, self._newer = _two_samples(nvml)
        self._last_s: float | None = None
        self.null_reasons: dict[str, str] = {}

    def read(self, t_s: float) -> dict[str, Value]:
        """Metrics since the last sample, up to `t_s` (seconds, monotonic); {} in the first call, and in one that comes too soon.

        NVMLError if NVML gives no sample.
        """
        last_s = self._last_s
        if last_s is not None and t_s - last_s < MIN_WINDOW_S:
            return {}
        self._older, self._newer = self._newer, self._older
        self._last_s = None  # if the next line fails, the next call begins anew
        self._nvml.nvmlGpmSampleGet(self._gpu, self._newer)
        self._last_s = t_s
        if last_s is None:
            return {}
        self._query.sample1, self._query.sample2 = self._older, self._newer
        self._nvml.nvmlGpmMetricsGet(self._query)
        return {WINDOW: t_s - last_s, **{column: self._value(column, index) for index, column in enumerate(METRICS)}}

    def close(self) -> None:
        """Frees NVML's samples. Ignores a lost GPU: the values read before stay."""
        for sample in (self._older, self._newer):
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlGpmSampleFree(sample)

    def _value(self, column: str, index: int) -> float | None:
        metric = self._query.metrics[index]
        if metric.nvmlReturn:
            self.null_reasons[column] = f"GPM: {self._nvml.NVMLError(metric.nvmlReturn)}"
            return None
        value = float(metric.value)
        if not math.isfinite(value) or value < 0:
            self.null_reasons[column] = f"GPM gave {value}"
            return None
        return value


def _query(nvml: Any) -> Any:
    query = nvml.c_nvmlGpmMetricsGet_t()
    query.version, query.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
    for index, (name, _) in enumerate(METRICS.values()):
        query.metrics[index].metricId = getattr(nvml, f"NVML_GPM_METRIC_{name}")
    return query


def _two_samples(nvml: Any) -> tuple[Any, Any]:
    try:
        return nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
    except nvml.NVMLError as error:
        raise NoGpm(f"NVML gives no GPM sample: {error}") from error
