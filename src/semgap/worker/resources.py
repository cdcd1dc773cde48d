"""The resources that all sessions of a worker share."""

from dataclasses import dataclass, field

from semgap.kv.host import connect_kv
from semgap.wire.link import Link
from semgap.worker.engines import Engines
from semgap.worker.weight_store import WeightStore


@dataclass(frozen=True)
class KVHostAddress:
    """The address of a worker's KV host, the secret that they share, and whether they speak TLS."""

    address: str
    secret: bytes
    tls: bool = False
    timeout_s: float = 30.0

    def connect(self) -> Link:
        """A link to the KV host. WireError if it does not answer."""
        return connect_kv(self.address, self.secret, self.timeout_s, self.tls)


@dataclass(frozen=True)
class Resources:
    """The store of weights, the KV host, the engines, and `io_cpus` (none: the worker's).

    These are the cores of samplers, of the thread that fetches KV blocks, and of sessions that an engine serves.
    """

    store: WeightStore
    kv_host: KVHostAddress | None = None
    io_cpus: tuple[int, ...] = ()
    engines: Engines = field(default_factory=Engines)
