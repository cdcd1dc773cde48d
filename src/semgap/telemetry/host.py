"""Samples of processes on this host (CPU time, memory, context switches), and of their cores."""

import contextlib
import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from semgap.telemetry.samples import T_S, Column, Row, Value

COLUMNS = (
    T_S,
    Column("side", "string", "role of the process: client, worker, ..."),
    Column("pid", "int64", "process id"),
    Column("cpu_user_s", "float64", "user CPU time of all its threads so far, without its children"),
    Column("cpu_system_s", "float64", "system CPU time of all its threads so far"),
    Column("cpu_percent", "float64", "CPU time since its last sample / time since then (100: one core); null at first"),
    Column("rss_bytes", "int64", "resident memory"),
    Column("rss_anon_bytes", "int64", "resident memory that no file backs (RssAnon)"),
    Column("voluntary_switches", "int64", "context switches by waiting, of its living threads, so far"),
    Column("involuntary_switches", "int64", "context switches by pre-emption, of its living threads, so far"),
    Column("cpu_mhz", "float64", "mean frequency now of the cores that it may use"),
    Column("steal_s", "float64", "time that the hypervisor took from this machine's cores so far (/proc/stat)"),
    Column("load_1m", "float64", "load average of the last minute"),
)

_CPUCLOCK_SCHED = 2
_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)$", re.MULTILINE)  # by waiting, then by pre-emption


class HostSampler:
    """Follows processes by pid (side -> pid); `sample` gives one row for each that still runs.

    An ended process (or a zombie) gets no more rows, even if its pid is used again. `null_reasons` says why a process or a column is
    missing.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.null_reasons: dict[str, str] = {}
        self._followed: dict[str, tuple[Any, set[int]]] = {}  # a process, and the cores that it may use
        self._last: dict[str, tuple[float, float]] = {}
        for side, pid in pids.items():
            try:
                self._followed[side] = psutil.Process(pid), os.sched_getaffinity(pid)
            except (psutil.NoSuchProcess, ProcessLookupError):
                self.null_reasons[f"side {side}"] = f"no process {pid} when sampling began"
        self._frequency = FrequencyReader(set().union(*(cores for _, cores in self._followed.values())))
        if self._frequency.missing is not None:
            self.null_reasons["cpu_mhz"] = self._frequency.missing

    def sample(self, t_s: float) -> list[Row]:
        """Reads every process once at `t_s` (seconds, monotonic); the keys are those of `COLUMNS`."""
        if not self._followed:
            return []
        frequencies = self._frequency.read()
        machine: dict[str, Value] = {"steal_s": psutil.cpu_times().steal, "load_1m": os.getloadavg()[0]}
        rows: list[Row] = []
        for side, (process, cores) in list(self._followed.items()):
            try:
                measured = self._measure(side, process)
            except (psutil.NoSuchProcess, ProcessEnded):
                del self._followed[side]
                continue
            here = [frequencies[core] for core in cores if core in frequencies]
            mean_mhz = sum(here) / len(here) if here else None
            rows.append({"t_s": t_s, **measured, "cpu_mhz": mean_mhz, **machine})
        return rows

    def _measure(self, side: str, process: Any) -> dict[str, Value]:
        with process.oneshot():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise psutil.NoSuchProcess(process.pid)
            times, memory = process.cpu_times(), process.memory_info()
        voluntary, involuntary = context_switches(process.pid)
        return {
            "side": side,
            "pid": process.pid,
            "cpu_user_s": times.user,
            "cpu_system_s": times.system,
            "cpu_percent": self._cpu_percent(side, process.pid),
            "rss_bytes": memory.rss,
            "rss_anon_bytes": memory.rss - memory.shared,
            "voluntary_switches": voluntary,
            "involuntary_switches": involuntary,
        }

    def _cpu_percent(self, side: str, pid: int) -> float | None:
        # Not t_s: the other columns were read since.
        last, now = self._last.get(side), (time.monotonic(), process_cpu_s(pid))
        self._last[side] = now
        return None if last is None else 100 * (now[1] - last[1]) / (now[0] - last[0])


class ProcessEnded(RuntimeError):
    """The process ended while this one read it."""


class FrequencyReader:
    """Reads the frequency of cores from cpufreq, or from /proc/cpuinfo if the CPU has APERF/MPERF counters.

    Without either (most virtual machines), /proc/cpuinfo shows the nominal frequency: `read` gives nothing, and `missing` says why.
    """

    def __init__(self, cores: Collection[int]) -> None:
        directory = Path("/sys/devices/system/cpu")
        paths = {core: directory / f"cpu{core}/cpufreq/scaling_cur_freq" for core in cores}
        self._paths = {core: path for core, path in paths.items() if os.access(path, os.R_OK)}
        self._cpuinfo = not self._paths and " aperfmperf" in Path("/proc/cpuinfo").read_text()
        readable = bool(self._paths) or self._cpuinfo
        self.missing = None if readable else "no cpufreq in /sys, and /proc/cpuinfo gives the nominal frequency only"

    def read(self) -> dict[int, float]:
        """The frequency of each readable core, in MHz."""
        if self._cpuinfo:
            return _cpuinfo_mhz(Path("/proc/cpuinfo").read_text())
        return {core: int(path.read_text()) / 1e3 for core, path in self._paths.items()}


def process_cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far, to the nanosecond. ProcessEnded.

    /proc/PID/stat counts in hundredths of a second, too coarse for a percentage over one sampling interval. The clock's number is that
    of clock_getcpuclockid(3) (kernel: include/linux/posix-timers.h).
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError as error:
        raise ProcessEnded(f"process {pid} has no CPU clock: {error}") from error


def context_switches(pid: int) -> tuple[int, int]:
    """Voluntary and involuntary context switches of a process's living threads. ProcessEnded.

    Reads all of /proc/PID/task: /proc/PID/status counts the main thread alone.
    """
    voluntary = involuntary = 0
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessEnded(f"process {pid} has ended: {error}") from error
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has just ended
            waited, preempted = _SWITCHES.findall((thread / "status").read_text())
            voluntary, involuntary = voluntary + int(waited), involuntary + int(preempted)
    return voluntary, involuntary


def _cpuinfo_mhz(text: str) -> dict[int, float]:
    found = re.findall(r"^processor\s*: (\d+)$.*?^cpu MHz\s*: ([\d.]+)$", text, re.MULTILINE | re.DOTALL)
    return {int(core): float(mhz) for core, mhz in found}
