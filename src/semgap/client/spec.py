"""What a trial tells its client, as JSON."""

import msgspec

from semgap.client.runtime import Drawing
from semgap.network.spec import Network
from semgap.policy import Policy


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trial's requests: `requests` for each prompt length, each a prefill and `steps` decode steps.

    `live_requests` of them are alive at a time and decode in turns; KV memory fits the fraction `kv_budget` of their caches.
    Before each decode step, one of `evict_fractions` of the layers leaves the device, in random order (pressure.py).
    The first prompts begin at `passages` of the prompts file, the others at its passages 0, 1, ... in turn.
    """

    kind: str
    prompt_lengths: tuple[int, ...]
    passages: tuple[int, ...] = ()
    requests: int = 1
    warmup_requests: int = 1
    warmup_steps: int = 2
    steps: int = 0
    sessions: int = 1
    live_requests: int = 1
    kv_budget: float = 1.0
    evict_fractions: tuple[float, ...] = ()


class Telemetry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    interval_s: float
    sources: tuple[str, ...]


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The probe of the link before the trial: 64-byte round trips, and payload bytes each way."""

    round_trips: int
    payload_bytes: int


class WorkerSide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worker, and how the client uses it. `stop`: the trial started the worker, and the client ends it."""

    address: str
    telemetry: Telemetry
    probe: Probe
    secret_file: str | None = None
    stop: bool = False
    network: Network = Network()
    timeout_s: float = 120.0


class ClientSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One trial, number `trial` of its cell. `text_pass`: afterwards run the measured requests once more, fed with the text itself.

    `control`: beside the decode steps the executor decodes the same positions by itself (control.py).
    `weights_held`: the worker was made to hold the model's weights before, whatever the mode says of them (hold_weights.py).
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
    spawned_s: float | None = None
    parent_pid: int | None = None

    @property
    def handles(self) -> int:
        """KV caches that are alive at a time: the requests', and the control's."""
        return self.phase.live_requests + self.control


class ClientError(Exception):
    """The client cannot run the trial as its spec says."""
