"""One trial as the client's process needs to know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from semgap.client.runtime import Drawing
from semgap.network.spec import Network
from semgap.policy import Policy

if TYPE_CHECKING:
    pass


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the requests of a trial are. `requests` for each prompt length; `steps` decode steps after each prefill.

    `live_requests` of them are alive at a time and decode in turns, over KV memory for the fraction `kv_budget` of their caches.
    Before decode step i, the fraction evict_fractions[i mod n] of the layers is taken off the device.
    """

    kind: str
    prompt_lengths: tuple[int, ...]
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
    """How the link is probed before the trial: 64-byte round trips, and payload bytes each way."""

    round_trips: int
    payload_bytes: int


class WorkerSide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worker and how to deal with it. `stop`: it was started for this trial and ends with it."""

    address: str
    telemetry: Telemetry
    probe: Probe
    secret_file: str | None = None
    stop: bool = False
    network: Network = Network()
    timeout_s: float = 120.0


class ClientSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One trial, as the client needs to know it. `text_pass`: the measured requests once more after it, fed with the text itself."""

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
    forced_tokens: tuple[tuple[int, ...], ...] | None = None
    text_pass: bool = False
    layers: int = 0
    model_id: str = ""
    spawned_s: float | None = None
    parent_pid: int | None = None


class ClientError(Exception):
    """The trial cannot be run as its spec says."""
