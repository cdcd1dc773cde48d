"""Starts and stops the samplers of one trial.

Each source is a process of its own: sampling never holds the interpreter of a measured process. Importing this module loads the
standard library alone (no pyarrow, psutil or pynvml). A sampler keeps its samples in memory and writes one file when it is
stopped; a dead one leaves an empty table with the full schema and the reason.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from semgap.telemetry import dmon, nvml
from semgap.telemetry.samples import Column, Cost, Recording, write_samples

SOURCES = ("host", "gpu", "dmon")
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SourceResult:
    """The result of one source.

    `path` is a file for `samples.read_samples`, with the source's full schema, even without `rows`. `reason` says what is missing and
    why (all rows, or
    values of some columns), or None. `cost` includes dmon's own CPU time; None if the sampler died.
    """

    path: Path
    rows: int
    reason: str | None
    cost: Cost | None


class Sampling:
    """Running samplers, from `start`. `pids` maps each source with a process to its pid."""

    def __init__(self, absent: "Mapping[str, tuple[Path, str]]", running: "Sequence[_Running]") -> None:
        self._absent = dict(absent)
        self._running = tuple(running)
        self._results: dict[str, SourceResult] | None = None
        self.pids: Mapping[str, int] = {each.source: each.process.pid for each in running}

    def stop(self, timeout_s: float = 10) -> dict[str, SourceResult]:
        """Ends the samplers and waits for their files; one result per source. A second call gives the same results.

        A sampler that still runs after `timeout_s` (for all together) is killed; its result says so.
        """
        if self._results is None:
            deadline_s = time.monotonic() + timeout_s
            for running in self._running:
                running.process.send_signal(signal.SIGTERM)
            absent = {source: empty(source, path, why) for source, (path, why) in self._absent.items()}
            self._results = absent | {each.source: _collect(each, deadline_s) for each in self._running}
        return dict(self._results)


def start(
    directory: Path,
    *,
    pids: Mapping[str, int],
    interval_s: float,
    sources: Sequence[str] = SOURCES,
    cpus: Collection[int] | None = None,
    device_uuid: str | None = None,
    ready_timeout_s: float = 15,
) -> Sampling:
    """Starts the samplers; returns when each has taken its first sample, has died, or was killed after `ready_timeout_s`.

    `pids`: side -> pid of the processes that source `host` follows. `cpus`: cores for the samplers (None: this process's).
    `device_uuid`: the GPU (None: CUDA's device 0). `interval_s` is that of `host` and `gpu`; dmon's is 1 s. Files:
    `directory/{source}.json`. Without a GPU `gpu` and `dmon` start no process, and their results say why. The samplers end with
    the calling thread. ValueError for bad arguments.
    """
    _check(sources, pids, interval_s)
    directory.mkdir(parents=True, exist_ok=True)
    settings, absent = _settings(sources, pids, interval_s, device_uuid)
    running: list[_Running] = []
    try:
        for source in settings:
            running.append(_launch(source, directory / f"{source}.json", settings[source], sorted(cpus or ())))
    except BaseException:
        for each in running:
            each.process.kill()
        raise
    _await_ready(running, ready_timeout_s)
    return Sampling({source: (directory / f"{source}.json", why) for source, why in absent.items()}, running)


@dataclass
class _Running:
    source: str
    path: Path
    process: "subprocess.Popen[bytes]"
    stdout: IO[bytes]
    stderr: IO[bytes]
    received: bytes = b""
    given_up: str | None = None


def _check(sources: Sequence[str], pids: Mapping[str, int], interval_s: float) -> None:
    unknown = [source for source in sources if source not in SOURCES]
    if unknown or len(set(sources)) != len(sources):
        raise ValueError(f"sources {list(sources)!r}: each of {', '.join(SOURCES)} at most once")
    if not interval_s > 0:
        raise ValueError(f"interval_s is {interval_s!r}; it must be above 0")
    if "host" in sources and not pids:
        raise ValueError("source 'host' follows processes, but pids is empty; give {side: pid} or leave out 'host'")


def _settings(
    sources: Sequence[str], pids: Mapping[str, int], interval_s: float, device_uuid: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The settings of each source (sampler_process.py), and the reasons of the sources that are unavailable here."""
    every: dict[str, dict[str, Any]] = {"host": {"pids": dict(pids), "interval_s": interval_s}}
    absent: dict[str, str] = {}
    if {"gpu", "dmon"} & set(sources):
        try:
            device = nvml.find_device(device_uuid)
            every["gpu"] = {"device_uuid": device.uuid, "interval_s": interval_s}
            every["dmon"] = {"executable": shutil.which("nvidia-smi"), "gpu_index": device.index}
            absent = {} if every["dmon"]["executable"] else {"dmon": "nvidia-smi is not on PATH"}
        except nvml.NoDevice as error:
            absent = {"gpu": str(error), "dmon": str(error)}
    wanted = {source: every[source] for source in sources if source not in absent}
    return wanted, {source: why for source, why in absent.items() if source in sources}


def _launch(source: str, path: Path, settings: Mapping[str, Any], cpus: Sequence[int]) -> _Running:
    path.unlink(missing_ok=True)  # not to be mistaken for this run's file
    order = {"source": source, "out": str(path), "parent": os.getpid(), "cpus": cpus, "settings": settings}
    inherited = os.environ.get("PYTHONPATH")
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open until the sampler's end, see _collect)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "semgap.telemetry.sampler_process", json.dumps(order)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGES), *filter(None, [inherited])])},
        process_group=0,  # out of reach of Ctrl-C: the parent stops it, or it ends with the parent
    )
    assert process.stdout
    return _Running(source, path, process, process.stdout, stderr)


def _await_ready(running: Sequence[_Running], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for each in running:
            selector.register(each.stdout, selectors.EVENT_READ, each)
        while selector.get_map() and time.monotonic() < deadline_s:
            for key, _ in selector.select(deadline_s - time.monotonic()):
                chunk = os.read(key.fd, 4096)
                key.data.received += chunk
                if not chunk or b"\n" in chunk:
                    selector.unregister(key.fileobj)
        for key in selector.get_map().values():
            key.data.given_up = f"the {key.data.source} sampler took no first sample within {timeout_s:g} s"
            key.data.process.kill()


def _collect(running: _Running, deadline_s: float) -> SourceResult:
    process = running.process
    try:
        process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        running.given_up = f"the {running.source} sampler did not end in time after SIGTERM, and was killed"
    with running.stdout as stdout, running.stderr as stderr:
        said = running.received + stdout.read()
        stderr.seek(0)
        complaint = stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
    if running.given_up or process.returncode != 0:
        why = running.given_up or f"the {running.source} sampler died ({_exit(process.returncode)})"
        return empty(running.source, running.path, f"{why}: {complaint}" if complaint else why)
    outcome = json.loads(said.splitlines()[-1])
    return SourceResult(running.path, outcome["rows"], outcome["reason"], Cost(**outcome["cost"]))


def empty(source: str, path: Path, reason: str) -> SourceResult:
    """Writes a source's table without rows, every column null for `reason`."""
    columns = _columns(source)
    write_samples(path, Recording(columns, (), {column.name: reason for column in columns}, reason))
    return SourceResult(path, 0, reason, None)


def _columns(source: str) -> tuple[Column, ...]:
    if source == "host":
        # Imported late: it loads psutil, which the parent does not need otherwise.
        from semgap.telemetry import host

        return host.COLUMNS
    return nvml.COLUMNS if source == "gpu" else dmon.table_columns()


def _exit(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name
