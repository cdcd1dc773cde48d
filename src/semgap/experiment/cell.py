"""A cell, typed: the slice of the config that a rule works on. Config makes it as a dict, whose digest says what its result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from semgap.client.runtime import Drawing
from semgap.client.spec import Phase, Probe, Telemetry
from semgap.network.spec import Network
from semgap.policy import Policy, policy_from

LOCAL = Policy(placement="local")
"""The policy of references: the client's process computes the logits of every position."""


class Cpus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """config.cpus: the cores of the side that computes and of the thin side. None: `split_cores` chooses."""

    worker: tuple[int, ...] | None = None
    client: tuple[int, ...] | None = None


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """config.worker: who starts the worker, where, and what it keeps."""

    launch: Literal["local", "external", "ssh", "srun"] = "local"
    address: str | None = None
    host: str | None = None
    python: str = "python3"
    ssh_config: str | None = None
    secret_file: str | None = None
    tls: bool = False
    kv_host_bytes: int = 4 << 30
    weight_cache: str | None = None


class TimeLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """config.timeouts, in seconds: until a worker takes clients, until it replies, and for a whole trial."""

    worker_start_s: float = 120.0
    reply_s: float = 120.0
    trial_s: float = 1800.0


class Cell(msgspec.Struct, frozen=True):
    """What a rule reads of its cell. A kind of cell that lacks a key leaves the field at its default, and its rule does not read it.

    The keys that no rule reads (code, prompts_digest, model_spec) count in the digest alone.
    """

    device: str
    threads: int
    cpus: Cpus
    model: str = ""
    mode: str = ""
    policy: Policy = LOCAL
    network_name: str = msgspec.field(default="", name="network")
    network: Network = msgspec.field(default=Network(), name="network_spec")
    kv_network: Network | None = msgspec.field(default=None, name="kv_network_spec")
    phase: Phase = msgspec.field(default=Phase("prefill", ()), name="phase_spec")
    dtype: str = "float32"
    max_length: int = 0
    executor: str = "auto"
    prompts: str = ""
    drawing: Drawing = msgspec.field(default_factory=Drawing, name="sampling")
    timeouts: TimeLimits = TimeLimits()
    worker: WorkerSettings = WorkerSettings()
    telemetry: Telemetry = Telemetry(0.1, ())
    probe: Probe = Probe(1, 1)
    trial: int = 1

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Cell:
        """The cell of a dict that Config made. PolicyError, which names the mode, for a policy that contradicts itself."""
        policy = policy_from(raw["policy"], raw.get("mode", "")) if "policy" in raw else LOCAL
        return msgspec.convert({**raw, "policy": policy}, cls)
