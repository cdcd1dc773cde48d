"""What a trial tells its client, as JSON."""

import msgspec

from semgap.client.runtime import Drawing
from semgap.network.spec import Network
from semgap.policy import Policy

OPEN_CONNECTIONS = 8
OPEN_LIVE = 32
"""Of an open loop, whose live requests are not known before: connections, and requests with KV memory."""


class Deadlines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The longest waits that a request's user accepts: `ttft_ms` from its arrival to its first token, and `tpot_ms` for each further one,
    on average.
    """

    ttft_ms: float
    tpot_ms: float


class RequestClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests alike, of a load. `steps` None: the phase's. Of the sum of all weights, `weight` requests in turn are of this class."""

    prompt_length: int
    steps: int | None = None
    weight: int = 1
    deadlines: Deadlines | None = None


class Arrivals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Poisson arrivals, a level for each rate: `per_s`, or each of `share` of the requests per second that mode `of` serves at most."""

    per_s: tuple[float, ...] = ()
    share: tuple[float, ...] = ()
    of: str | None = None


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of arrivals (load_trace.py), whose prefix hashes stand for `block` tokens each."""

    file: str
    block: int = 512


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trial's requests: `requests` for each prompt length, each a prefill and `steps` decode steps.

    `live_requests` of them are alive at a time and decode in turns; KV memory fits the fraction `kv_budget` of their caches.
    Before each decode step, one of `evict_fractions` of the layers leaves the device, in random order (pressure.py).
    Before a trial's session another one computes the first tokens of its measured requests, so many as `prefix_lengths` says in turn, and
    publishes them by content in the KV host (prefixes.py).
    The first prompts begin at `passages` of the prompts file, the others at its passages 0, 1, ... in turn.

    A load has many requests alive, on `connections` (None: as many as live requests, OPEN_CONNECTIONS if they are not known before). It is
    a closed loop of each `concurrency` in turn, or an open one of `arrivals`, or of a `trace` (with `arrivals`: at their rates).
    `classes` in turn, or without them one a prompt length, whose prompts share their first `shared_prefix` tokens. `requests` are then
    those that each level measures, of all classes.
    """

    kind: str
    prompt_lengths: tuple[int, ...] = ()
    passages: tuple[int, ...] = ()
    requests: int = 1
    warmup_requests: int = 1
    warmup_steps: int = 2
    steps: int = 0
    sessions: int = 1
    live_requests: int = 1
    kv_budget: float = 1.0
    evict_fractions: tuple[float, ...] = ()
    prefix_lengths: tuple[int, ...] = ()
    concurrency: tuple[int, ...] = ()
    arrivals: Arrivals | None = None
    trace: Trace | None = None
    classes: tuple[RequestClass, ...] = ()
    shared_prefix: int = 0
    deadlines: Deadlines | None = None
    connections: int | None = None

    @property
    def is_load(self) -> bool:
        return self.kind == "load"

    def prefix_of(self, number: int) -> int | None:
        """The tokens with which measured request `number` begins that another session has published; None if none publishes any."""
        return self.prefix_lengths[number % len(self.prefix_lengths)] if self.prefix_lengths else None

    @property
    def links(self) -> int:
        """Connections of a load."""
        return self.connections or max(self.concurrency, default=OPEN_CONNECTIONS)

    @property
    def most_live(self) -> int:
        """Requests whose KV caches the worker's memory must hold at a time; of an open loop, those that may run at once."""
        return max(self.concurrency, default=OPEN_LIVE) if self.is_load else self.live_requests


class Telemetry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    interval_s: float
    sources: tuple[str, ...]


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The probe of the link before the trial: 64-byte round trips, and payload bytes each way."""

    round_trips: int
    payload_bytes: int


class WorkerSide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worker, and how the client uses it. `stop`: the trial started the worker, and the client ends it. `second`: the address of the
    worker to which requests move, if they do.
    """

    address: str
    telemetry: Telemetry
    probe: Probe
    secret_file: str | None = None
    tls: bool = False
    stop: bool = False
    network: Network = Network()
    timeout_s: float = 120.0
    second: str | None = None


class ClientSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One trial, number `trial` of its cell. `text_pass`: afterwards run the measured requests once more, fed with the text itself.

    `control`: beside the decode steps the executor decodes the same positions by itself (control.py). `root`: where a trace's path starts.
    `weights_held`: the worker was made to hold the model's weights before, whatever the mode says of them (hold_weights.py).
    `salt`: the trial's own, so that its sessions share KV blocks with each other alone.
    `waits`: the client gets `worker` from its standard input, as JSON, and begins when it is there.
    `forced_tokens`: for each measured request the tokens that its steps are fed. `spawned_s`: CLOCK_MONOTONIC when the trial spawned it.
    """

    directory: str
    model_directory: str
    prompts_file: str
    policy: Policy
    phase: Phase
    dtype: str
    threads: int
    max_length: int
    device: str
    executor: str = "auto"
    drawing: Drawing = msgspec.field(default_factory=Drawing)
    cpus: tuple[int, ...] = ()
    worker: WorkerSide | None = None
    waits: bool = False
    forced_tokens: tuple[tuple[int, ...], ...] | None = None
    text_pass: bool = False
    control: bool = False
    trial: int = 1
    weights_held: bool = False
    layers: int = 0
    model_id: str = ""
    salt: str = ""
    spawned_s: float | None = None
    root: str = ""
    parent_pid: int | None = None

    @property
    def handles(self) -> int:
        """KV caches that are alive at a time: the requests', and the control's."""
        return self.phase.most_live + self.control


class ClientError(Exception):
    """The client cannot run the trial as its spec says."""
