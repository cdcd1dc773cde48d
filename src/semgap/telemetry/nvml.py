"""Samples of one GPU through NVML (nvidia-ml-py)."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from semgap.telemetry import gpm
from semgap.telemetry.samples import T_S, Column, Row, Value

_ENERGY = "energy_j"
COLUMNS = (
    T_S,
    Column("gpu_index", "int64", "NVML's index of the GPU"),
    Column("gpu_uuid", "string", "the GPU's UUID"),
    Column("gpu_percent", "float64", "part of the driver's last sampling period in which any kernel ran"),
    Column("memory_controller_percent", "float64", "part of that period in which device memory was read or written"),
    Column("memory_used_bytes", "float64", "device memory in use, of all processes"),
    Column("power_w", "float64", "power draw; from Ampere on (except GA100) its mean over the last second"),
    Column("power_instant_w", "float64", "power draw now (field POWER_INSTANT)"),
    Column("temperature_c", "float64", "temperature of the GPU die"),
    Column("sm_clock_mhz", "float64", "SM clock"),
    Column("memory_clock_mhz", "float64", "memory clock"),
    Column(_ENERGY, "float64", "energy since the driver was loaded; only in the first and the last row, because a call takes 4 ms"),
    *gpm.COLUMNS,
)


class NoDevice(RuntimeError):
    """No GPU can be sampled; the message says why."""


@dataclass(frozen=True)
class Device:
    """One GPU in NVML's enumeration. `name` is the product's."""

    index: int
    uuid: str
    name: str


@contextmanager
def open_nvml() -> Iterator[Any]:
    """Loads and initialises NVML for the block. NoDevice without binding, library or driver, and where NVML refuses what the block asks."""
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
    except nvml.NVMLError as error:
        raise NoDevice(f"NVML: {error}") from error
    finally:
        nvml.nvmlShutdown()


def find_device(uuid: str | None = None) -> Device:
    """The GPU with this UUID or unique prefix of one, or else CUDA's device 0 here. NoDevice, also if the GPU is split by MIG."""
    with open_nvml() as nvml:
        devices = list_devices(nvml)
        device = resolve_visible(os.environ, devices) if uuid is None else _by_uuid(uuid, devices)
        if _is_split(nvml, device):
            raise NoDevice(f"GPU {device.index} ({device.uuid}) is split by MIG: CUDA sees a slice, NVML's counters cover the whole GPU")
    return device


def other_processes(device: Device) -> list[tuple[int, int | None]]:
    """(pid, bytes of device memory or None) of each process that computes on a GPU, without this one. NoDevice."""
    with open_nvml() as nvml:
        found = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(device.uuid))
    return [(each.pid, each.usedGpuMemory) for each in found if each.pid != os.getpid()]


def require_gpm() -> Device:
    """CUDA's device 0 here. NoDevice, or gpm.NoGpm if it has no GPM."""
    device = find_device()
    with open_nvml() as nvml:
        gpm.require_gpm(nvml, nvml.nvmlDeviceGetHandleByUUID(device.uuid))
    return device


def resolve_visible(environment: Mapping[str, str], devices: Sequence[Device]) -> Device:
    """CUDA's device 0: CUDA_VISIBLE_DEVICES is unset, or begins with an index, or with a UUID or its unique prefix.

    NoDevice for an index among GPUs of different kinds, unless CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA numbers the fastest first, NVML by
    PCI bus. NoDevice for MIG devices too: NVML's counters cover the whole GPU.
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
    """Reads one GPU's metrics; `sample` gives one row. `null_reasons` holds the last reason per column.

    The column of a metric that the device lacks is null; one that fails for another reason is null in that row. Total energy takes
    4 ms a call on an H100: only the first and the last sample read it. PCIe throughput takes 21 ms: GPM and dmon give it instead.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._identity: dict[str, Value] = {"gpu_index": nvml.nvmlDeviceGetIndex(self._handle), "gpu_uuid": uuid}
        self._error: type[Exception] = nvml.NVMLError
        self._for_good = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission)
        self._missing: set[str] = set()
        self._readings = _readings(nvml)
        self._null_reasons: dict[str, str] = {}
        self._gpm: gpm.GpmReader | None = None
        try:
            self._gpm = gpm.GpmReader(nvml, self._handle)
        except gpm.NoGpm as error:
            self._give_up_gpm(str(error))

    @property
    def null_reasons(self) -> Mapping[str, str]:
        return self._null_reasons | (self._gpm.null_reasons if self._gpm else {})

    def sample(self, t_s: float, edge: bool) -> Row:
        """A row at `t_s` (seconds, monotonic); `edge`: it is the first or the last. The keys are those of `COLUMNS`."""
        row: dict[str, Value] = {"t_s": t_s, **self._identity}
        self._read_gpm(t_s, row)
        for column, read in self._readings.items():
            if column in self._missing or (column == _ENERGY and not edge):
                continue
            try:
                row[column] = read(self._handle)
            except self._error as error:
                self._null_reasons[column] = f"NVML: {error}"
                if isinstance(error, self._for_good):
                    self._missing.add(column)
        return row

    def close(self) -> None:
        """Frees NVML's samples."""
        if self._gpm:
            self._gpm.close()

    def _read_gpm(self, t_s: float, row: dict[str, Value]) -> None:
        # Comes first: its sample must be close to t_s.
        if self._gpm is None:
            return
        try:
            row.update(self._gpm.read(t_s))
        except self._error as error:
            if isinstance(error, self._for_good):
                self._gpm.close()
                self._gpm = None
            self._give_up_gpm(f"GPM: {error}")

    def _give_up_gpm(self, why: str) -> None:
        self._null_reasons |= {column.name: why for column in gpm.COLUMNS}


def _readings(nvml: Any) -> dict[str, Callable[[Any], float]]:
    return {
        "power_w": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "power_instant_w": lambda gpu: _field(nvml, gpu, nvml.NVML_FI_DEV_POWER_INSTANT) / 1e3,
        "gpu_percent": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_controller_percent": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).memory,
        "memory_used_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        "temperature_c": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        _ENERGY: lambda gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
    }


def _field(nvml: Any, gpu: Any, number: int) -> int:
    """An unsigned 32-bit field. NVMLError if the field holds an error."""
    (field,) = nvml.nvmlDeviceGetFieldValues(gpu, [number])
    if field.nvmlReturn:
        raise nvml.NVMLError(field.nvmlReturn)
    return int(field.value.uiVal)


def list_devices(nvml: Any) -> list[Device]:
    """All GPUs that the driver shows."""
    handles = ((index, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount()))
    return [Device(index, nvml.nvmlDeviceGetUUID(gpu), nvml.nvmlDeviceGetName(gpu)) for index, gpu in handles]


def _is_split(nvml: Any, device: Device) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByUUID(device.uuid))[0])
    except nvml.NVMLError:  # a GPU without MIG
        return False


def _by_uuid(uuid: str, devices: Sequence[Device], context: str = "") -> Device:
    if uuid.startswith("MIG-"):
        raise NoDevice(f"{context}{uuid} is a MIG slice; NVML's counters cover the whole GPU")
    found = [device for device in devices if uuid.startswith("GPU-") and device.uuid.startswith(uuid)]
    if len(found) != 1:
        known = ", ".join(device.uuid for device in devices) or "none"
        raise NoDevice(f"{context}{uuid!r} names {len(found)} GPUs; the driver shows {known}")
    return found[0]
