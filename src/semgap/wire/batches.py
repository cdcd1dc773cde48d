"""The steps of a worker's engine, and its state, as they cross to a client."""

import msgspec

from semgap.wire.step_cost import Floor


class Batch(msgspec.Struct, array_like=True, frozen=True):
    """One step of an engine. It began at `begin_s`, CLOCK_MONOTONIC of the worker's host.

    `decodes` of its `requests` fed one token that followed a drawn one; the others fed `prefill_tokens` of their prompts. `live` requests
    could have run, and `queued` more waited for a place or for KV blocks. `kv_blocks` were held, `kv_shared` of them by several requests.
    """

    begin_s: float
    requests: int
    decodes: int
    prefill_tokens: int
    drawn: int
    live: int
    queued: int
    kv_blocks: int
    kv_shared: int
    schedule_s: float
    compute_s: float
    reply_s: float

    @property
    def tokens(self) -> int:
        """Token positions that the step computed."""
        return self.decodes + self.prefill_tokens

    @property
    def occupancy(self) -> float:
        """The fraction of live requests that ran."""
        return self.requests / self.live


class EngineState(msgspec.Struct, frozen=True):
    """An engine now. `steps`: of its life; of these the last ones are rows. `kv_held` of its `kv_blocks` belong to requests.

    `floor`: of a step, measured when a session first asked.
    """

    pid: int
    executor_s: float
    peak_rss_bytes: int
    sessions: int
    live: int
    queued: int
    kv_blocks: int
    kv_block_bytes: int
    kv_held: int
    steps: int
    floor: Floor
