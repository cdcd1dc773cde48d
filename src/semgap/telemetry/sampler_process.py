"""One sampler process: samples one source until SIGTERM, writes its file, and ends.

`samplers` starts it as `python -m semgap.telemetry.sampler_process ORDER`, JSON of {source, out, parent, cpus, settings}, where `settings`
are those of its `record_` function. It prints a line `ready` after the first sample, and at the end a JSON object {rows, reason, cost}.
It keeps samples in memory and writes them once: a killed sampler leaves no file, and its parent reports that.
"""

import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from semgap.processes.lifetime import end_with_parent
from semgap.telemetry import nvml
from semgap.telemetry.dmon import table_columns
from semgap.telemetry.dmon_process import DmonLines, DmonProcess, start_dmon
from semgap.telemetry.samples import Column, Cost, Recording, Row, write_samples

Ready = Callable[[], None]


class StopSignal:
    """Waits for SIGTERM, from its creation on."""

    def __init__(self) -> None:
        self._wake_fd, self._signal_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._signal_fd, False)
        signal.set_wakeup_fd(self._signal_fd, warn_on_full_buffer=False)
        # The wakeup descriptor is written only for signals that have a handler.
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait(self, timeout_s: float | None, *fds: int) -> tuple[bool, list[int]]:
        """Waits for SIGTERM or for data on one of `fds`; gives whether SIGTERM ever came, and the fds with data."""
        poller = select.poll()
        for fd in (self._wake_fd, *fds):
            poller.register(fd, select.POLLIN)
        readable = {fd for fd, _ in poller.poll(None if timeout_s is None else 1000 * timeout_s)}
        return self._wake_fd in readable, [fd for fd in fds if fd in readable]


def ticks(interval_s: float, stop: StopSignal) -> Iterator[tuple[float, bool]]:
    """Yields (time, edge) now, at each multiple of the interval, and at SIGTERM; `edge` at the first and the last.

    Seconds, monotonic. Leaves out missed ticks. With the last tick cumulative counters span the whole measurement.
    """
    start_s = time.monotonic()
    count, stopped = 0, False
    while not stopped:
        now_s = time.monotonic()
        yield now_s, not count
        now_s = time.monotonic()
        count = max(count + 1, math.ceil((now_s - start_s) / interval_s))
        stopped, _ = stop.wait(max(0.0, start_s + count * interval_s - now_s))
    yield time.monotonic(), True


def record_host(pids: Mapping[str, int], interval_s: float, stop: StopSignal, ready: Ready) -> Recording:
    """Samples processes until SIGTERM; see host.py."""
    # Imported late: only this source needs psutil.
    from semgap.telemetry.host import COLUMNS, HostSampler

    sampler = HostSampler(pids)
    rows, cost = _at_ticks(lambda t_s, edge: sampler.sample(t_s), interval_s, stop, ready)
    return Recording(COLUMNS, rows, sampler.null_reasons, _summary(sampler.null_reasons), cost)


def record_gpu(device_uuid: str, interval_s: float, stop: StopSignal, ready: Ready) -> Recording:
    """Samples a GPU through NVML until SIGTERM; see nvml.py."""
    with nvml.open_nvml() as library:
        sampler = nvml.NvmlSampler(library, device_uuid)
        rows, cost = _at_ticks(lambda t_s, edge: [sampler.sample(t_s, edge)], interval_s, stop, ready)
        null_reasons = dict(sampler.null_reasons)
        sampler.close()
    return Recording(nvml.COLUMNS, rows, null_reasons, _summary(null_reasons), cost)


def record_dmon(executable: str, gpu_index: int, stop: StopSignal, ready: Ready) -> Recording:
    """Collects the output of `nvidia-smi dmon` until SIGTERM; `t_s` is the arrival of a line.

    RuntimeError if dmon ends before its first sample. If it ends later, its samples stay and the reason says so.
    """
    dmon, lines = start_dmon(executable, gpu_index), DmonLines()
    before_s, begin_s = time.process_time(), time.monotonic()
    ended = _follow_dmon(dmon, lines, stop, ready)
    span_s, status = time.monotonic() - begin_s, dmon.end()
    problems = [f"line refused: {problem}" for problem in lines.problems]
    if ended:
        problems.insert(0, f"nvidia-smi dmon ended by itself with status {status}")
    if ended and not lines.rows:
        raise RuntimeError("; ".join(problems))
    stop.wait(None)
    columns = table_columns(lines.parser.columns)
    null_reasons = _dmon_null_reasons(columns, lines)
    more = [f"{problems[0]} (and {len(problems) - 1} more)"] if len(problems) > 1 else problems
    reason = "; ".join(filter(None, [*more, _summary(null_reasons)])) or None
    dmon_cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = Cost(len(lines.rows), span_s, time.process_time() - before_s + dmon_cpu.ru_utime + dmon_cpu.ru_stime, None)
    return Recording(columns, lines.rows, null_reasons, reason, cost)


def _follow_dmon(dmon: DmonProcess, lines: DmonLines, stop: StopSignal, ready: Ready) -> bool:
    """Reads until SIGTERM (False), or until dmon ends by itself (True)."""
    while True:
        stopped, readable = stop.wait(None, dmon.output_fd, dmon.ended_fd)
        if stopped or not readable:
            return not stopped
        # Output of an ended dmon comes first.
        chunk = dmon.read() if dmon.output_fd in readable else b""
        if not chunk:
            return True
        was_ready = bool(lines.rows)
        lines.feed(chunk, time.monotonic())
        if lines.rows and not was_ready:
            ready()


def _dmon_null_reasons(columns: Sequence[Column], lines: DmonLines) -> dict[str, str]:
    if not lines.rows:
        return {column.name: "dmon gave no sample" for column in columns}
    printed = {"t_s", *(column.key for column in lines.parser.columns)}
    valued = {key for row in lines.rows for key, value in row.items() if value is not None}
    return {
        column.name: "dmon printed '-'" if column.name in printed else "not among the columns that dmon printed"
        for column in columns
        if column.name not in valued
    }


def _at_ticks(sample: Callable[[float, bool], Sequence[Row]], interval_s: float, stop: StopSignal, ready: Ready) -> tuple[list[Row], Cost]:
    """The rows of all ticks, and the cost of those after the first, which loads and opens things."""
    rows: list[Row] = []
    samples, busy_s = 0, 0.0
    for t_s, edge in ticks(interval_s, stop):
        rows.extend(sample(t_s, edge))
        if samples == 0:
            before_s, begin_s = time.process_time(), time.monotonic()
            ready()
        else:
            busy_s += time.monotonic() - t_s
        samples += 1
    return rows, Cost(samples - 1, time.monotonic() - begin_s, time.process_time() - before_s, busy_s)


def _summary(null_reasons: Mapping[str, str]) -> str | None:
    whys = dict.fromkeys(null_reasons.values())
    named = ((", ".join(what for what, of in null_reasons.items() if of == why), why) for why in whys)
    return "; ".join(f"{what}: {why}" for what, why in named) or None


def main(order: Mapping[str, Any]) -> None:
    """Runs one sampler process to its end; see the module's docstring."""
    end_with_parent(order["parent"])
    stop = StopSignal()
    if order["cpus"]:
        os.sched_setaffinity(0, order["cpus"])
    records: dict[str, Callable[..., Recording]] = {"host": record_host, "gpu": record_gpu, "dmon": record_dmon}
    recording = records[order["source"]](**order["settings"], stop=stop, ready=lambda: print("ready", flush=True))
    write_samples(Path(order["out"]), recording)
    outcome = {"rows": len(recording.rows), "reason": recording.reason, "cost": recording.cost and asdict(recording.cost)}
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
