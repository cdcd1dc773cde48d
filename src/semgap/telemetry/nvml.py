"""Samples of one GPU through NVML (nvidia-ml-py)."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from semgap.telemetry.samples import T_S, Column, Row, Value

SLOW_INTERVAL_S = 1.0
"""How often the expensive metrics are read at most, in seconds.

PCIe throughput takes 21 ms a call (it counts over 20 ms) and total energy 4 ms, the others 2-3 us (H100). The
expensive ones are read after the cheap ones, and are null in the rows in between.
"""

COLUMNS = (
    T_S,
    Column("gpu_index", "int64", "NVML's index of the GPU"),
    Column("gpu_uuid", "string", "the GPU's UUID"),
    Column("gpu_percent", "float64", "part of the driver's last sampling period in which any kernel ran"),
    Column(
        "memory_controller_percent",
        "float64",
        "part of that period in which device memory was read or written",
    ),
    Column("memory_used_bytes", "float64", "device memory in use, of all processes"),
    Column("power_w", "float64", "power draw"),
    Column("temperature_c", "float64", "temperature of the GPU die"),
    Column("sm_clock_mhz", "float64", "SM clock"),
    Column("memory_clock_mhz", "float64", "memory clock"),
    Column("energy_j", "float64", "energy since the driver was loaded; read at most once a second"),
    Column(
        "pcie_tx_kb_per_s",
        "float64",
        "PCIe, device to host, over 20 ms (NVML's KB/s); read at most once a second",
    ),
    Column(
        "pcie_rx_kb_per_s",
        "float64",
        "PCIe, host to device, over 20 ms (NVML's KB/s); read at most once a second",
    ),
)


class NoDevice(RuntimeError):
    """There is no GPU to sample; the message says why."""


@dataclass(frozen=True)
class Device:
    """One GPU as NVML enumerates it. `name` is the product's."""

    index: int
    uuid: str
    name: str


@contextmanager
def open_nvml() -> Iterator[Any]:
    """Load and initialise NVML for the block; raises `NoDevice` without binding, library or driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise NoDevice(f"nvidia-ml-py is not installed ({error})") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoDevice(f"no NVIDIA driver: {error}") from error
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def find_device(uuid: str | None = None) -> Device:
    """Find the GPU with this UUID (or unique prefix of it), or the one that CUDA calls device 0 here.

    Raises `NoDevice`.
    """
    with open_nvml() as nvml:
        devices = _list_devices(nvml)
    return resolve_visible(os.environ, devices) if uuid is None else _by_uuid(uuid, devices)


def visible_device_uuid() -> str:
    """Give the UUID of the GPU that CUDA calls device 0 in this environment; raises `NoDevice`.

    NVML ignores CUDA_VISIBLE_DEVICES, so its index 0 may be another GPU.
    """
    return find_device().uuid


def resolve_visible(environment: Mapping[str, str], devices: Sequence[Device]) -> Device:
    """Find the GPU that CUDA calls device 0.

    CUDA_VISIBLE_DEVICES is unset, or begins with an index or with a UUID or its unique prefix. CUDA numbers
    the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID, NVML by PCI bus: with GPUs of different kinds and
    the default order an index is refused. Raises `NoDevice`, for MIG devices too: NVML's
    counters are those of the whole GPU.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if not devices:
        raise NoDevice("the NVIDIA driver shows no GPU")
    if not first.isdecimal():
        return _by_uuid(first, devices, f"CUDA_VISIBLE_DEVICES={visible!r}: ")
    if int(first) >= len(devices):
        raise NoDevice(f"CUDA_VISIBLE_DEVICES={visible!r}: index {first} of {len(devices)} GPUs")
    if environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len({device.name for device in devices}) > 1:
        raise NoDevice(f"index {first} is ambiguous among GPUs of different kinds; set CUDA_DEVICE_ORDER=PCI_BUS_ID or give a UUID")
    return devices[int(first)]


class NvmlSampler:
    """Reads one GPU's metrics; `sample` gives one row.

    A metric that the device does not have is not asked for again: its column is null. One that failed for
    another reason is null in that row. `null_reasons` holds the last reason per column.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._identity: dict[str, Value] = {
            "gpu_index": nvml.nvmlDeviceGetIndex(self._handle),
            "gpu_uuid": uuid,
        }
        self._error: type[Exception] = nvml.NVMLError
        self._for_good = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
        )
        self._missing: set[str] = set()
        self._cheap, self._slow = _cheap_readings(nvml), _slow_readings(nvml)
        self._slow_due_s = float("-inf")
        self.null_reasons: dict[str, str] = {}

    def sample(self, t_s: float) -> Row:
        """Read what is due at `t_s` (seconds, monotonic); keys are those of `COLUMNS`."""
        row: dict[str, Value] = {"t_s": t_s, **self._identity}
        self._read(self._cheap, row)
        if t_s >= self._slow_due_s:
            self._slow_due_s = t_s + SLOW_INTERVAL_S
            self._read(self._slow, row)
        return row

    def _read(self, readings: "Mapping[str, _Reading]", row: dict[str, Value]) -> None:
        for column, read in readings.items():
            if column in self._missing:
                continue
            try:
                row[column] = read(self._handle)
            except self._error as error:
                self.null_reasons[column] = f"NVML: {error}"
                if isinstance(error, self._for_good):
                    self._missing.add(column)


_Reading = Callable[[Any], float]


def _cheap_readings(nvml: Any) -> dict[str, _Reading]:
    return {
        "gpu_percent": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_controller_percent": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).memory,
        "memory_used_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        "power_w": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "temperature_c": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    }


def _slow_readings(nvml: Any) -> dict[str, _Reading]:
    return {
        "energy_j": lambda gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
        "pcie_tx_kb_per_s": lambda gpu: nvml.nvmlDeviceGetPcieThroughput(gpu, nvml.NVML_PCIE_UTIL_TX_BYTES),
        "pcie_rx_kb_per_s": lambda gpu: nvml.nvmlDeviceGetPcieThroughput(gpu, nvml.NVML_PCIE_UTIL_RX_BYTES),
    }


def _list_devices(nvml: Any) -> list[Device]:
    handles = ((index, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount()))
    return [Device(index, nvml.nvmlDeviceGetUUID(gpu), nvml.nvmlDeviceGetName(gpu)) for index, gpu in handles]


def _by_uuid(uuid: str, devices: Sequence[Device], context: str = "") -> Device:
    if uuid.startswith("MIG-"):
        raise NoDevice(f"{context}{uuid} is a MIG slice; NVML's counters are those of the whole GPU")
    found = [device for device in devices if uuid.startswith("GPU-") and device.uuid.startswith(uuid)]
    if len(found) != 1:
        known = ", ".join(device.uuid for device in devices) or "none"
        raise NoDevice(f"{context}{uuid!r} names {len(found)} GPUs; the driver shows {known}")
    return found[0]
