"""The samplers of a worker and its host, which a session's client starts and stops."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from semgap.codecs import Encoded
from semgap.processes.scratch import owned_directory
from semgap.telemetry import samplers
from semgap.telemetry.clock import read_clock
from semgap.wire import messages
from semgap.wire.frames import Frame
from semgap.wire.link import Link, Refused, control

_LEAST_INTERVAL_S, _MOST_INTERVAL_S = 0.01, 60.0  # as config.telemetry.interval_s


class SessionSamplers:
    """At most one set of samplers, and the directory of their files. They run on `io_cpus` unless the client names cores.

    `pid` is the process that computes for the session: itself, or an engine.
    """

    def __init__(self, io_cpus: Sequence[int]) -> None:
        self.pid = os.getpid()
        self._io_cpus = io_cpus
        self._sampling: samplers.Sampling | None = None
        self._directory: tempfile.TemporaryDirectory | None = None

    def answer(self, link: Link, request: Frame) -> None:
        """Starts the samplers, stops them and sends their files, or reads the clock of their stamps."""
        header = request.header_as(messages.TelemetryRequest)
        body: dict[str, Any] = {}
        files: list[Encoded] = []
        if header.action == "start":
            self._start(header)
        elif header.action == "clock":
            body = read_clock()
        elif header.action == "stop" and self._sampling is not None:
            body, files = self._stop(self._sampling)
        else:
            raise Refused("telemetry", f"telemetry {header.action!r}: say 'start', then 'stop', or 'clock'")
        link.reply(request, messages.Bodied((), msgspec.json.encode(body)), files)

    def end(self) -> None:
        """Stops the samplers and removes their files."""
        try:
            if self._sampling:
                self._sampling.stop(1.0)
        finally:
            if self._directory:
                self._directory.cleanup()

    def _start(self, header: messages.TelemetryRequest) -> None:
        if self._sampling:
            raise Refused("telemetry", "telemetry runs already; stop it first")
        if not _LEAST_INTERVAL_S <= header.interval_s <= _MOST_INTERVAL_S:  # samples stay in memory until the stop
            raise Refused("telemetry", f"interval_s is {header.interval_s:g}; use {_LEAST_INTERVAL_S:g} to {_MOST_INTERVAL_S:g}")
        self._directory = self._directory or owned_directory("telemetry")
        self._sampling = samplers.start(
            Path(self._directory.name),
            pids={"worker": self.pid},
            interval_s=header.interval_s,
            sources=header.sources,
            cpus=header.cpus or self._io_cpus or None,
        )

    def _stop(self, sampling: samplers.Sampling) -> tuple[dict[str, Any], list[Encoded]]:
        results = sampling.stop()
        self._sampling = None
        body = {name: {"rows": r.rows, "reason": r.reason, "cost": r.cost and r.cost.describe()} for name, r in results.items()}
        return body, [control(result.path.read_bytes()) for result in results.values()]
