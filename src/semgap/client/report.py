"""The client's report: the structs of report.json, which the client writes and the trial reads, and the names of the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from semgap.wire.ledger import Row
from semgap.wire.step_cost import Floor, StepCost

LOGITS_FILE, TEXT_FILE = "logits.npz", "text.npz"
"""What the measured requests gave, and what they gave when the text was fed."""

_REPORT_FILE = "report.json"


def session_logits_file(number: int) -> str:
    """The logits of session `number`, from 1, which was not the last one."""
    return f"logits-{number}.npz"


def worker_samples_file(source: str) -> str:
    """The worker's samples of one source."""
    return f"worker-{source}.json"


class Measured(msgspec.Struct, frozen=True):
    """Begin and end of the requests, warm-up included: CLOCK_MONOTONIC of the client's host."""

    start_s: float
    end_s: float


class Granted(msgspec.Struct, frozen=True):
    """The worker's answer to a session request, as far as the client uses it. `machine` is `machine.identity` there."""

    device: str
    executor: str
    executor_reason: str | None
    executor_compiled_for: str | None
    threads: int
    congestion: str
    machine: dict[str, str | None]


class KVHostCounters(msgspec.Struct, frozen=True):
    """The KV host's own sums."""

    frame_bytes_by_kind: dict[str, int]


class KVHostBooks(msgspec.Struct, frozen=True):
    """The worker's link to its KV host. Rows and counters are missing if the two sides do not agree; `reason` says why."""

    agreed: bool
    reason: str | None
    rows: tuple[Row, ...] = ()
    peer_rows: tuple[Row, ...] = ()
    tcp: dict[str, int] = {}
    peer_tcp: dict[str, int] = {}
    peer: KVHostCounters | None = None
    closing_frame_bytes: int = 0
    tls: str | None = None


class WorkerCounters(msgspec.Struct, frozen=True):
    """The worker's own counters of a session. `pcie_reason`: why nothing crosses PCIe there, or None."""

    steps: tuple[StepCost, ...]
    peak_rss_bytes: int
    executor_s: float
    weight_store_bytes: int
    pcie_reason: str | None
    frame_bytes_by_kind: dict[str, int]
    kv_budget_bytes: int | None
    fallbacks: tuple[str, ...]
    floor: Floor
    kv_host: KVHostBooks | None


class Books(msgspec.Struct, frozen=True):
    """The reconciled books of a session: `wire.reconcile.reconcile`, typed."""

    rows: tuple[Row, ...]
    peer_rows: tuple[Row, ...]
    tcp: dict[str, int]
    peer_tcp: dict[str, int]
    peer: WorkerCounters
    closing_frame_bytes: int
    congestion: str
    tls: str | None


class Sampled(msgspec.Struct, frozen=True):
    """One telemetry source of the worker: its file holds `rows`; `reason` says what is missing; `cost` is Cost.describe()."""

    rows: int
    reason: str | None
    cost: dict[str, float | int | None] | None


class ClockOffset(msgspec.Struct, frozen=True):
    """The worker's CLOCK_MONOTONIC less the client's, and the largest error of that."""

    offset_s: float
    error_s: float


class Session(msgspec.Struct, frozen=True):
    """One session with a worker. `start_tcp`: the kernel's counters before the probe; `link_bytes`: the connection's, up and down.

    `kv_probe`: of the worker's link to its KV host, if that is a network of the config.
    """

    granted: Granted
    probe: dict[str, float | int]
    start_tcp: dict[str, int]
    books: Books
    samples: dict[str, Sampled]
    clock: ClockOffset
    link_bytes: dict[str, int]
    kv_probe: dict[str, float | int] | None = None


class Connection(msgspec.Struct, frozen=True):
    """A further connection, of a load or of the session that published prefixes: reconciled by itself, with the kernel's counters at its
    start, its books, and its bytes up and down.
    """

    start_tcp: dict[str, int]
    books: Books
    link_bytes: dict[str, int]


class LoadLevel(msgspec.Struct, frozen=True):
    """One level of a load, over its measured window from `start_s` to `end_s` (CLOCK_MONOTONIC of the client).

    `requests` ended in it (closed loop) or arrived in it (open). `tokens` arrived in it, so many of them in each half. `live_start`,
    `live_end`: requests alive at its ends. Frame bytes up and down, `round_trips` and the client's CPU time are of all connections.
    `late_p95_s`, `late_max_s`: how long after its time the generator sent a request, over those after the ramp.
    """

    level: int
    concurrency: int | None
    rate_per_s: float | None
    share: float | None
    start_s: float
    end_s: float
    requests: int
    tokens: int
    half_tokens: tuple[int, int]
    live_start: int
    live_end: int
    up_frame_bytes: int
    down_frame_bytes: int
    round_trips: int
    client_cpu_s: float
    late_p95_s: float
    late_max_s: float


class Load(msgspec.Struct, frozen=True):
    """A load: its levels, a row a token for load.parquet, a row an engine step for batches.parquet, and the engine's KV memory."""

    levels: tuple[LoadLevel, ...]
    tokens: tuple[dict[str, Any], ...]
    batches: tuple[dict[str, Any], ...]
    engine: dict[str, Any]


class Report(msgspec.Struct, frozen=True):
    """One client's run. `steps`, `requests` and `control` are rows of their tables (loop.py).

    `setup` names seconds and bytes before the requests; `executor_reason` why `auto` took eager, or None;
    `executor_compiled_for` the machine of `fused`'s kernels, or None. `floor` is of a local
    mode, `session` the last session of another. A load has `load`. `connections` are those beside that session,
    `second` that to the worker to which requests move.
    """

    steps: tuple[dict[str, Any], ...]
    requests: tuple[dict[str, Any], ...]
    control: tuple[dict[str, Any], ...]
    setup: dict[str, Any]
    measured: Measured
    client_peak_rss_anon_bytes: int
    device: str
    executor: str
    executor_reason: str | None
    executor_compiled_for: str | None
    floor: Floor | None = None
    session: Session | None = None
    connections: tuple[Connection, ...] = ()
    second: Connection | None = None
    load: Load | None = None

    @classmethod
    def read(cls, directory: Path) -> Report:
        """The report that a client left in its directory."""
        return msgspec.json.decode((directory / _REPORT_FILE).read_bytes(), type=cls)

    def write(self, directory: Path) -> None:
        (directory / _REPORT_FILE).write_bytes(msgspec.json.encode(self))
