"""The cost of one forward pass on a worker, as it crosses to the client when a session ends."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Recovered:
    """The record of a step that missed blocks or made room. Times in ns; bytes of both directions. The default: none was missing.

    `planned` is the way that was begun, `how` the way that was taken in the end (None: no block was missing), and `predicted_ns` the
    prediction of a cost model, if one chose the way. `stall_ns` is the time without compute: making room, waiting for blocks, recomputing.
    Of a prefix that a KV host knows, both predictions are there whenever they can be made.
    `kv_codecs` are those in which the fetched layers came, in their order: `raw x 3, int8 x 9`; None if no layer came.
    `missing_bytes` are filled bytes before any codec. `saved_network_bytes` are blocks of this or other handles, saved to make room.
    """

    how: str | None = None
    planned: str | None = None
    missing_bytes: int = 0
    stall_ns: int = 0
    predicted_ns: int | None = None
    fetched_network_bytes: int = 0
    saved_network_bytes: int = 0
    copied_bytes: int = 0
    fallback: str | None = None
    predicted_fetch_ns: int | None = None
    predicted_recompute_ns: int | None = None
    kv_codecs: str | None = None

    def after(self, before: Recovered) -> Recovered:
        """This record, with the bytes and the stall of what was done for the step before."""
        codecs = ", ".join(codecs for codecs in (before.kv_codecs, self.kv_codecs) if codecs)
        names = ("missing_bytes", "stall_ns", "fetched_network_bytes", "saved_network_bytes", "copied_bytes")
        return replace(self, kv_codecs=codecs or None, **{name: getattr(before, name) + getattr(self, name) for name in names})


@dataclass(frozen=True)
class Floor:
    """The least work of a decode step: reading `step_bytes` of weights, at the cores' `read_bytes_per_s`. None with a `reason`."""

    read_bytes_per_s: float | None
    step_bytes: int | None
    reason: str | None = None


@dataclass
class StepCost:
    """The cost of one forward pass. `codec_ns`: decoding the request and encoding the reply; in a window the first step of a
    frame has it. `gpu_ns` is None without a GPU, `recovered` if no block was missing and no room had to be made."""

    sequence: int
    compute_ns: int
    cpu_ns: int
    codec_ns: int
    gpu_ns: int | None
    recovered: Recovered | None
