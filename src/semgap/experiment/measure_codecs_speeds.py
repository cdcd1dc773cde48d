"""Speeds of codecs, in a process of its own: over the same memory again and again (warm), and over memory that no cache holds (cold).

`python -m semgap.experiment.measure_codecs_speeds PARENT_PID SAMPLES SPEEDS` reads samples (msgpack) and writes speeds (JSON).
"""

from __future__ import annotations

import ctypes
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from semgap import codecs
from semgap.codecs import CODECS, Codec, CodecError
from semgap.processes.lifetime import end_with_parent
from semgap.tensors import Tensor

CPU = "cpu"
BUDGET_S, _LONG_BUDGETS, _FEWEST_RUNS, _MOST_RUNS = 0.005, 6, 3, 15
_COLD_RUNS = 3
_CALL_NS, _FASTEST_BYTES_PER_NS = 20_000, 50  # passing memory on takes less than a call, its clock and a read at 50 GB/s
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE_BYTES, _DEVICE_CACHE_BYTES = 64 << 20, 256 << 20


class Sample(msgspec.Struct, frozen=True):
    """The first bytes of a group of tensors in one dtype."""

    group: str
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors)


class Speed(msgspec.Struct, frozen=True):
    """One process's speeds of a codec on a sample, in raw bytes a nanosecond; None for a way that only passes memory on."""

    group: str
    dtype: str
    codec: str
    device: str
    warm_encode: float | None
    warm_decode: float | None
    cold_encode: float | None
    cold_decode: float | None


class Run(ABC):
    """A codec over tensors, a step at a time: `encode`, `join`, then `decode`. Each way gives its own nanoseconds."""

    def __init__(self, tensors: Sequence[Tensor], codec: Codec, where: str = CPU) -> None:
        self.tensors, self.codec, self.where = tensors, codec, where

    @abstractmethod
    def encode(self) -> int:
        """Encodes all tensors. CodecError as the codec."""

    @abstractmethod
    def join(self) -> None:
        """Makes one payload of each tensor's buffers: the socket's work, not timed."""

    @abstractmethod
    def decode(self) -> int:
        """Decodes the payloads."""

    def passes_on(self) -> tuple[bool, bool]:
        """For each way: does it hand on the very memory that it was given?"""
        return False, False


class HostRun(Run):
    """In host memory, by the thread's CPU time, which page faults are a part of and other processes on the core are not."""

    def encode(self) -> int:
        begin_ns = time.thread_time_ns()
        self._encoded = [codecs.encode(tensor, self.codec) for tensor in self.tensors]
        return time.thread_time_ns() - begin_ns

    def join(self) -> None:
        self.payloads = tuple(memoryview(b"".join(one.buffers)) for one in self._encoded)

    def decode(self) -> int:
        pairs = zip(self._encoded, self.payloads, strict=True)
        begin_ns = time.thread_time_ns()
        self.decoded = tuple(codecs.decode(self.codec.code, one.cls, one.dtype, one.shape, payload)[0] for one, payload in pairs)
        return time.thread_time_ns() - begin_ns

    def passes_on(self) -> tuple[bool, bool]:
        same_in = all(one.buffers[:1] and one.buffers[0] is tensor.data for one, tensor in zip(self._encoded, self.tensors, strict=True))
        same_out = all(tensor.data is payload for tensor, payload in zip(self.decoded, self.payloads, strict=True))
        return same_in, same_out


class DeviceRun(Run):
    """On the device where the tensors are, in its own time, without copies over PCIe. `where`: a name for torch."""

    def __init__(self, tensors: Sequence[Tensor], codec: Codec, where: str) -> None:
        from semgap.codecs.arrays import from_wire

        super().__init__(tensors, codec, where)
        self._there = [from_wire(tensor, where)[None] for tensor in tensors]

    def encode(self) -> int:
        from semgap.codecs import device

        self._made = [device.encode(tensor, self.codec) for tensor in self._there]
        return sum(one.encode_ns for one in self._made)

    def join(self) -> None:
        import torch

        self.payloads = tuple(memoryview(bytes(one.heads[0]) + one.body.cpu().numpy().tobytes()) for one in self._made)
        self._uploaded = [torch.frombuffer(bytearray(one), dtype=torch.uint8).to(self.where) for one in self.payloads]

    def decode(self) -> int:
        from semgap.codecs import device
        from semgap.codecs.clock import Clock

        took_ns, self._back = 0, []
        for tensor, payload, host in zip(self.tensors, self._uploaded, self.payloads, strict=True):
            clock = Clock(self.where)
            value, intact = device.decode(self.codec, payload, host, tensor.dtype, tensor.shape)
            clock.stop()
            device.require(intact)
            took_ns += clock.took_ns()
            self._back.append(value)
        return took_ns

    @property
    def decoded(self) -> tuple[Tensor, ...]:
        """The decoded tensors, in host memory."""
        from semgap.codecs.arrays import to_wire

        return tuple(to_wire(value, tensor.cls) for value, tensor in zip(self._back, self.tensors, strict=True))


def run_of(tensors: Sequence[Tensor], codec: Codec, where: str = CPU) -> HostRun | DeviceRun:
    """The codec over `tensors`, on device `where`."""
    return HostRun(tensors, codec) if where == CPU else DeviceRun(tensors, codec, where)


def measure(samples: Sequence[Sample], coders: Sequence[Codec], where: str, evict: Callable[[], object]) -> Iterator[Speed]:
    """The speeds of each codec on each sample that it accepts, in memory of its own.

    Warm: the median run (`repeat`). Cold: the median of 3 runs, each over memory that nothing has touched since `evict`, into memory from
    the system. The warm runs come first, so that a codec's own state is ready.
    """
    pairs = [(sample, codec) for codec in coders for sample in samples if sample.tensors[0].cls in codec.accepts]
    warm = []
    for sample, codec in pairs:
        run = run_of([_own(tensor) for tensor in sample.tensors], codec, where)
        try:
            encode_ns = repeat(run.encode)
        except CodecError:
            continue  # the job's row has the reason
        run.join()
        warm.append((sample, run, encode_ns, repeat(run.decode)))
    cold_encode = _cold([run.encode for _, run, _, _ in warm], evict)
    for _, run, _, _ in warm:
        run.join()
    cold_decode = _cold([run.decode for _, run, _, _ in warm], evict)
    for (sample, run, *warm_ns), *cold_ns in zip(warm, cold_encode, cold_decode, strict=True):
        yield _speed(sample, run, warm_ns, cold_ns)


def _cold(runs: Sequence[Callable[[], int]], evict: Callable[[], object]) -> list[float]:
    """The median nanoseconds of each run, in rounds that begin with an eviction."""
    took: list[list[int]] = [[] for _ in runs]
    for _ in range(_COLD_RUNS):
        evict()
        for run, own_ns in zip(runs, took, strict=True):
            own_ns.append(fresh(run))
    return [median(own_ns) for own_ns in took]


def _speed(sample: Sample, run: Run, warm_ns: Sequence[float], cold_ns: Sequence[float]) -> Speed:
    """Of a run, by its nanoseconds each way."""
    at_most_ns = len(sample.tensors) * _CALL_NS + sample.nbytes / _FASTEST_BYTES_PER_NS
    handed = [same and took_ns < at_most_ns for same, took_ns in zip(run.passes_on(), warm_ns, strict=True)]
    taken = zip((*warm_ns, *cold_ns), handed * 2, strict=True)
    speeds = [None if is_handed else sample.nbytes / took_ns for took_ns, is_handed in taken]
    return Speed(sample.group, sample.tensors[0].dtype.torch_name, run.codec.name, run.where, *speeds)


def repeat(run: Callable[[], int], budget_s: float = BUDGET_S) -> float:
    """The median nanoseconds of `run`: a warm-up, 3 runs, and more while `budget_s` lasts, 15 at most.

    Long runs vary little: they stop early after 6 budgets. If the warm-up alone takes that long, it is the only run and counts; else it
    does not, since fresh memory can make it many times slower than the others.
    """
    begin = time.perf_counter()
    took_ns = run()
    if time.perf_counter() - begin >= _LONG_BUDGETS * budget_s:
        return took_ns
    runs_ns: list[int] = []
    while not runs_ns or _goes_on(len(runs_ns), time.perf_counter() - begin, budget_s):
        runs_ns.append(run())
    return median(runs_ns)


def _goes_on(runs: int, elapsed_s: float, budget_s: float) -> bool:
    return runs < _MOST_RUNS and elapsed_s < (_LONG_BUDGETS * budget_s if runs < _FEWEST_RUNS else budget_s)


def evictor(where: str = CPU) -> Callable[[], object]:
    """A function that leaves no tensor in the caches of a device: it reads as many bytes as the largest cache holds."""
    if where == CPU:
        return np.ones(largest_cache_bytes() // 8, dtype=np.uint64).sum
    import torch

    return torch.ones(_DEVICE_CACHE_BYTES // 8, dtype=torch.int64, device=where).sum


def largest_cache_bytes() -> int:
    """The size of the first core's largest cache, as the kernel says it; 64 MiB if it does not."""
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=_UNKNOWN_CACHE_BYTES)


def fresh(run: Callable[[], int]) -> int:
    """One run whose output lies in memory from the system, touched for the first time: freed memory goes back to it before."""
    ctypes.CDLL(None).malloc_trim(0)
    return run()


def main(parent_pid: str, samples_file: str, speeds_file: str) -> None:
    """Measures every codec on every sample that it accepts, where it can run."""
    end_with_parent(int(parent_pid))
    device, samples = msgspec.msgpack.decode(Path(samples_file).read_bytes(), type=tuple[str, tuple[Sample, ...]])
    speeds: list[Speed] = []
    for where in dict.fromkeys((CPU, device)):
        coders = [codec for codec in CODECS.values() if where in places(codec, device) and not (codec.needs_gpu and where == CPU)]
        speeds += measure(samples, coders, where, evictor(where))
    Path(speeds_file).write_bytes(msgspec.json.encode(speeds))


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, aligned as numpy does."""
    return replace(tensor, data=memoryview(np.frombuffer(tensor.data, np.uint8).copy()))


def places(codec: Codec, device: str) -> list[str]:
    """The devices to measure a codec on: the CPU, the run's GPU if the codec can use it, or both."""
    if device == CPU or not codec.on_device or codec.unavailable():
        return [CPU]
    return [device] if codec.needs_gpu else [CPU, device]


if __name__ == "__main__":
    main(*sys.argv[1:])
