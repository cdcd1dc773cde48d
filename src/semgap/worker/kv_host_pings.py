"""Pings of a worker's KV host, which its client asks for to know that link."""

from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.recovery import LiveCaches
from semgap.wire import messages
from semgap.wire.frames import Frame, WireError
from semgap.wire.link import Link, Refused, ping_ns
from semgap.worker.resources import KVHostAddress


class KVHostPings:
    """Of one session: over the link of its blocks, or, before it has one, over a link of its own."""

    def __init__(self, kv_host: KVHostAddress | None) -> None:
        self._kv_host = kv_host
        self._link: Link | None = None

    def answer(self, client: Link, request: Frame, caches: LiveCaches | None) -> None:
        """Pings the KV host and says how long it took. Refused without a KV host, and, as ShadowError, if it does not answer."""
        asked = request.header_as(messages.PingKVHost)
        if caches and isinstance(caches.shadow, KVHostShadow):
            caches.quiet()
            took_ns = caches.shadow.ping_ns(asked.up_bytes, asked.down_bytes)
        else:
            took_ns = self._ping_ns(asked.up_bytes, asked.down_bytes)
        client.reply(request, messages.KVHostPinged((), took_ns))

    def _ping_ns(self, up_bytes: int, down_bytes: int) -> int:
        try:
            return ping_ns(self._own_link(), up_bytes, down_bytes)
        except WireError as error:  # not the client's connection, whose end would end the session
            self.close()
            self._link = None
            raise Refused("kv_host", f"the worker's KV host does not answer: {error}") from error

    def _own_link(self) -> Link:
        if self._kv_host is None:
            raise Refused("kv_host", "this worker has no KV host to ping; start it with --kv-host HOST:PORT")
        if self._link is None:
            self._link = self._kv_host.connect()
        return self._link

    def close(self) -> None:
        if self._link:
            self._link.close()
