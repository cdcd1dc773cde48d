"""A shadow in a KV host, another process behind the wire."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import xxhash

from semgap import codecs
from semgap.codecs import Encoded
from semgap.kv.blocks import KVCache
from semgap.kv.pool import BLOCK
from semgap.kv.shadow import PROBE_BYTES, Moved, Shadow, ShadowError, codecs_of
from semgap.kv.transfer import BlockTransfer, Held, LayerBlock, Leaving, Undecoded
from semgap.tensors import Tensor, TensorClass, nbytes_of
from semgap.wire import frames, messages
from semgap.wire.frames import DeadlineError, Flag, FrameError, WireError
from semgap.wire.ledger import Direction, Ledger, LedgerError
from semgap.wire.link import Link, RemoteError, ping_ns
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile
from semgap.wire.tcp import Timeouts
from semgap.wire.waiting import ready

REFUSALS = ("unknown", "fenced", "layout", "gone", "budget", "mask", "place", "ping")
"""Error codes of a KV host after which the connection goes on; it ends the connection after any other."""

_FIRST_PROBE_BYTES, _SLOWEST_NS = 1 << 16, 200_000_000
"""A link over which so many bytes take longer is slow enough to know it from them: more would take minutes."""

_SLOW_NS, _SLOW_PROBE_BYTES = 20_000_000, 1 << 18  # where the first take longer, PROBE_BYTES would take seconds, twice

_PUT_FRAME_BYTES = 8 << 20
_PUT_FRAME_BLOCKS = 512  # their places must fit a header
_EXACT = {codec.code for codec in codecs.CODECS.values() if codec.exact}
_SAVES = ("put_kv_blocks", "put_prefix_block")
_FETCHES = ("fetch_missing_kv_layers", "follow_kv", "find_prefix", "fetch_prefix")


@dataclass
class _Opened:
    """A handle at the KV host: the epoch in which this side writes, and [layers, blocks] of the versions that it saved."""

    epoch: int
    versions: np.ndarray


@dataclass
class KVHostShadow(Shadow):
    """Keeps blocks in a KV host. `connect` gives an authenticated link to it, or raises WireError; `ledger`, the session's, counts copies
    between a GPU and pinned memory. `takes_lossy`: False refuses blocks that come in a codec which changes them.

    A broken link is given up, and the next use opens a new one. The ledger of the broken link is lost, and `books` says so.
    """

    connect: Callable[[], Link]
    layout: messages.KVLayout
    transfer: BlockTransfer[Any]
    ledger: Ledger = field(default_factory=Ledger)
    takes_lossy: bool = True
    broken_links: int = 0
    came: list[str] = field(default_factory=list)
    _link: Link | None = None
    _handles: dict[bytes, _Opened] = field(default_factory=dict)
    _on_link: set[bytes] = field(default_factory=set)
    _followed: tuple[bytes, np.ndarray] = (b"", np.zeros((0, 0), dtype=np.int64))
    _undecoded: list[Undecoded] = field(default_factory=list)
    _stops_following: bool = False

    def save(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, by_layer: Sequence[str], tokens: np.ndarray) -> Moved:
        opened = self._open(kv_id, cache)
        texts = texts_of(tokens, [cache.bounds(block)[1] for block in range(cache.shape.blocks)])
        moved = Moved()
        for places, encoded in self.leaving(cache, _batches(np.argwhere(blocks).tolist(), cache), by_layer):
            put = messages.PutKVBlocks((), kv_id, opened.epoch, places, tuple(texts[cache.bounds(block)[1]] for _, block in places))
            opened, version = self._put_blocks(put, encoded, cache, opened)
            for (layer, block), tensor in zip(places, encoded, strict=True):
                opened.versions[layer, block] = version
                cache.saved[layer, block] = cache.counts[block]
                moved += Moved(1, nbytes_of(tensor.dtype, tensor.shape), tensor.nbytes)
        return moved

    def _put_blocks(self, put: messages.PutKVBlocks, encoded: list[Encoded], cache: KVCache, opened: _Opened) -> tuple[_Opened, int]:
        """Puts blocks; gives the handle and their version. A handle that the KV host dropped, after all its blocks, is opened anew."""
        try:
            return opened, self.ask(Operation.PUT_KV_BLOCKS, put, encoded, Kind.DELTA).header_as(messages.KVPut).version
        except ShadowError as error:
            if error.code != "unknown":
                raise
        self._on_link.discard(put.kv_id)
        opened = self._open(put.kv_id, cache)
        put = msgspec.structs.replace(put, epoch=opened.epoch)
        return opened, self.ask(Operation.PUT_KV_BLOCKS, put, encoded, Kind.DELTA).header_as(messages.KVPut).version

    def leaving(
        self, cache: KVCache, batches: Iterable[list[LayerBlock]], by_layer: Sequence[str]
    ) -> Iterator[tuple[tuple[LayerBlock, ...], list[Encoded]]]:
        """The blocks of each batch for the wire, and their places, in its order. The next batch leaves a GPU while one is sent."""
        begun: Leaving[Any] | None = None
        for places in batches:
            after = self.transfer.leave(cache, places, by_layer)
            self._count_copies(Direction.DOWN, Operation.PUT_KV_BLOCKS, after.staged)
            if begun is not None:
                yield begun.places, begun.encoded()
            begun = after
        if begun is not None:
            yield begun.places, begun.encoded()

    def _count_copies(self, direction: Direction, operation: Operation, held: Iterable[Held[Any]]) -> None:
        """Counts copies between a GPU and pinned memory."""
        for one in held if self.transfer.is_staged else ():
            raw, crossed = self.transfer.moved_bytes(one)
            link = self.transfer.link
            self.ledger.count_copy(direction, operation, Kind.DELTA, TensorClass.KV, raw, payload_bytes=crossed, link=link)

    def fetch(self, kv_id: bytes, cache: KVCache, blocks: np.ndarray, patience_s: float | None = None) -> Iterator[int]:
        opened = self._open(kv_id, cache)
        mask = Tensor.from_numpy(blocks.astype(np.uint8), TensorClass.CONTROL)
        header = messages.FetchMissing((), kv_id, opened.epoch)
        return self.stream(Operation.FETCH_MISSING_KV_LAYERS, header, [codecs.encode(mask, "raw")], cache, blocks, patience_s)

    def stream(
        self,
        operation: Operation,
        header: messages.Header,
        tensors: list[Encoded],
        cache: KVCache,
        blocks: np.ndarray,
        patience_s: float | None = None,
    ) -> Iterator[int]:
        """Requests blocks by an operation that is answered by a stream of KVBlocks. Gives each layer's index as `fetch` does."""
        self.transfer.begin_incoming()
        self.came.clear()
        with self._giving_up():
            link = self._linked()
            sequence = link.post(operation, header, tensors, Kind.DELTA)
        link.ledger.count_round_trip(link.sending, operation, Kind.DELTA)
        until_s = None if patience_s is None else time.monotonic() + patience_s
        return self._arrivals(link, operation, sequence, cache, blocks, until_s)

    def _arrivals(
        self, link: Link, operation: Operation, sequence: int, cache: KVCache, blocks: np.ndarray, until_s: float | None
    ) -> Iterator[int]:
        layers = np.flatnonzero(blocks.any(axis=1)).tolist()
        for layer in layers:
            wanted = np.flatnonzero(blocks[layer]).tolist()

            with self._giving_up():
                with _hurried(link, until_s):
                    frame = link.receive_stream(operation, sequence, self._places(cache, layer, wanted))
                if bool(frame.flags & Flag.LAST) != (layer == layers[-1]):
                    raise FrameError("sequence", f"the stream of KV blocks ended at layer {layer}, expected layers {layers}")
                self._put(cache, layer, wanted, frame)
            yield layer

    def follow(self, kv_id: bytes, cache: KVCache) -> Iterator[int]:
        """Requests the blocks of a handle that another worker puts meanwhile, for a cache of as many positions in which all is missing.

        Gives each layer's index as `fetch` does, once that worker has put it: all layers, or those before `stop_following`.
        """
        self.transfer.begin_incoming()
        self.came.clear()
        operation = Operation.FOLLOW_KV
        with self._giving_up():
            link = self._linked()
            sequence = link.post(operation, messages.FollowKV((), kv_id, self.layout, cache.filled), (), Kind.DELTA)
        link.ledger.count_round_trip(link.sending, operation, Kind.DELTA)
        self._undecoded = []
        self._followed, self._stops_following = (kv_id, np.zeros(cache.missing.shape, dtype=np.int64)), False
        return self._followings(link, sequence, cache, self._followed[1])

    def stop_following(self) -> None:
        """Ends `follow` after the layers that are on their way. Since somebody waits for the link, a CPU decodes them later. A link that
        breaks is given up by the thread that receives alone.
        """
        link, self._stops_following = self._link, True  # that thread may set the link to None meanwhile
        try:
            if link is not None:
                link.interject(Operation.CANCEL)
        except WireError:
            self.abort()

    def _followings(self, link: Link, sequence: int, cache: KVCache, versions: np.ndarray) -> Iterator[int]:
        wanted = np.flatnonzero(cache.counts).tolist()
        for layer in range(cache.shape.layers + 1):
            with self._giving_up():
                while not (link.has_input() or self._stops_following):  # a layer comes when the other worker has computed it
                    ready([link.sock], timeout_s=link.timeouts.idle_s)
                frame = link.receive_stream(Operation.FOLLOW_KV, sequence, self._places(cache, layer, wanted))
                if frame.flags & Flag.LAST:
                    return
                header = frame.header_as(messages.KVFollowed)
                if header.blocks != tuple(wanted) or len(header.versions) != len(wanted) or layer == cache.shape.layers:
                    raise FrameError("blocks", f"a stream of KV blocks went on with blocks {header.blocks} after {layer} layers")
                versions[layer, wanted] = header.versions
                self._put(cache, layer, wanted, frame)
            yield layer

    def followed(self, kv_id: bytes) -> tuple[np.ndarray, list[Undecoded]]:
        """[layers, blocks]: the blocks of a handle, taken over since, that `follow` brought and that nobody has put anew; and those of them
        that are yet to be decoded.
        """
        name, versions = self._followed
        current = self._handles[kv_id].versions
        if name != kv_id:
            return np.zeros(current.shape, dtype=bool), []
        valid = (versions == current) & (versions > 0)
        return valid, [one for one in self._undecoded if valid[one.layer, [*one.held]].all()]

    def decoded(self, cache: KVCache, undecoded: Sequence[Undecoded]) -> Iterator[int]:
        """Decodes payloads of `followed` into their slabs; gives each layer's index as `fetch` does."""
        self.came.clear()
        for one in undecoded:
            held = {block: each for block, each in one.held.items() if cache.counts[block]}
            with self._giving_up():
                self._place(cache, one.layer, held, Operation.FOLLOW_KV, Kind.DELTA)
            cache.missing[one.layer, [*held]] = False
            yield one.layer

    def _places(self, cache: KVCache, layer: int, wanted: list[int]) -> frames.Destinations:
        """Where the blocks of a layer go. It raises FrameError for a frame of other blocks."""

        def place(_: Operation, header: messages.Header) -> list[frames.Memory | None]:
            if not header.tensors and isinstance(header, messages.KVFollowed):  # the end
                return []
            if layer == cache.shape.layers:
                raise FrameError("blocks", f"KV blocks came after those of all {layer} layers")
            _check_blocks(header, cache, layer, wanted, self.takes_lossy)
            return self.transfer.memory_for(cache, layer, wanted, header.tensors)

        return place

    def _put(self, cache: KVCache, layer: int, wanted: list[int], frame: frames.Frame) -> None:
        """Puts the blocks of a frame into their slab. FrameError for a damaged payload."""
        held = self.transfer.received(wanted, frame)
        self.came.append(codecs_of(head.codec for head in frame.header.tensors))
        if held and frame.operation is Operation.FOLLOW_KV and self._stops_following and not self.transfer.is_staged:
            own = {block: replace(one, payload=memoryview(bytes(one.payload))) for block, one in held.items()}
            self._undecoded.append(Undecoded(layer, own))
            return
        self._place(cache, layer, held, frame.operation, frame.kind)
        cache.missing[layer, wanted] = False

    def _place(self, cache: KVCache, layer: int, held: dict[int, Held[Any]], operation: Operation, kind: Kind) -> None:
        try:
            decode_ns = self.transfer.put(cache, layer, held)
        except codecs.CodecError as error:
            raise FrameError("payload", str(error)) from error
        if self._link is not None:  # else its ledger is lost
            self._link.ledger.count_codec(self._link.receiving, operation, kind, TensorClass.KV, decode_ns=decode_ns)
        self._count_copies(Direction.UP, operation, held.values())

    def forget(self, kv_id: bytes) -> None:
        opened = self._handles.get(kv_id)
        if opened is None or self._link is None:  # `close` makes a link for it
            return
        try:
            self.ask(Operation.DROP_KV, messages.DropKV((), kv_id, opened.epoch))
        except ShadowError as error:
            if self._link is None:
                return
            if error.code not in ("fenced", "unknown"):
                raise
        del self._handles[kv_id]

    def promise(self, kv_id: bytes) -> None:
        """Opens a new handle at the KV host for another worker. ShadowError."""
        self._handles[kv_id], _, _ = self._ask_to_open(messages.OpenKV((), kv_id, self.layout, 0, True, True))

    def take_over(self, kv_id: bytes, tokens: np.ndarray) -> np.ndarray:
        """Becomes the writer of a handle at the KV host. Gives [layers, blocks]: the positions of each block that was computed from
        `tokens`. ShadowError (unknown, layout)."""
        opened, positions, texts = self._ask_to_open(messages.OpenKV((), kv_id, self.layout, 0, False, True))
        ends = positions + BLOCK * np.arange(positions.shape[1])
        known = texts_of(tokens, ends[(positions > 0) & (ends <= len(tokens))].tolist())
        positions[np.vectorize(lambda end: known.get(end, 0), otypes=[np.int64])(ends) != texts] = 0
        self._handles[kv_id] = opened
        return positions

    def probe(self) -> tuple[float, float]:
        self.ping_ns(0, 64)
        rtt_ns, first_ns = self.ping_ns(0, 64), self.ping_ns(0, _FIRST_PROBE_BYTES)
        if first_ns > _SLOWEST_NS:
            return rtt_ns / 1e9, _FIRST_PROBE_BYTES / (first_ns / 1e9)
        nbytes = _SLOW_PROBE_BYTES if first_ns - rtt_ns > _SLOW_NS else PROBE_BYTES
        self.ping_ns(0, nbytes)
        return rtt_ns / 1e9, nbytes / (max(1, self.ping_ns(0, nbytes) - rtt_ns) / 1e9)

    def ping_ns(self, up_bytes: int, down_bytes: int) -> int:
        """The time of a ping of the KV host (`wire.link.ping_ns`)."""
        with self._giving_up():
            return ping_ns(self._linked(), up_bytes, down_bytes)

    def abort(self) -> None:
        link = self._link  # the other thread may set it to None meanwhile
        if link is not None:  # wakes the thread that reads from it, which gives the link up
            with contextlib.suppress(OSError):
                link.sock.shutdown(socket.SHUT_RDWR)

    def reach(self) -> None:
        """ShadowError if the KV host cannot be reached. Call it before anything depends on the shadow."""
        with self._giving_up():
            self._linked()

    def ask(
        self, operation: Operation, header: messages.Header, tensors: list[Encoded] | None = None, kind: Kind = Kind.SETUP
    ) -> frames.Frame:
        """The KV host's answer. ShadowError."""
        with self._giving_up():
            return self._linked().request(operation, header, tensors or [], kind)

    def books(self) -> dict[str, Any] | None:
        if self.broken_links:
            return {"agreed": False, "reason": f"{self.broken_links} links to the KV host broke, and their counters with them"}
        if self._link is None:
            return None
        try:
            return {"agreed": True, "reason": None} | reconcile(self._link, "KV host")
        except (LedgerError, WireError) as error:
            return {"agreed": False, "reason": str(error)}

    @property
    def network_bytes(self) -> tuple[int, int]:
        if self._link is None:
            return 0, 0
        rows = [row for row in self._link.ledger.rows.values() if row.kind == "delta"]
        saved, fetched = (sum(row.payload_bytes + row.header_bytes for row in rows if row.operation in of) for of in (_SAVES, _FETCHES))
        return saved, fetched

    def close(self) -> None:
        with contextlib.suppress(ShadowError):  # the KV host is gone, and all blocks with it
            for kv_id in [*self._handles]:
                self.reach()
                self.forget(kv_id)
        if self._link is not None:
            self._link.close()
            self._link = None

    def _linked(self) -> Link:
        if self._link is None:
            self._link = self.connect()
            self._on_link.clear()
        return self._link

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Turns a WireError into a ShadowError, and closes the link unless the KV host merely refused a request."""
        try:
            yield
        except WireError as error:
            if not (isinstance(error, RemoteError) and error.code in REFUSALS) and self._link is not None:
                self._link.close()
                self._link = None
                self.broken_links += 1
            raise ShadowError(error.code, f"the KV host: {error}") from error

    def _open(self, kv_id: bytes, cache: KVCache) -> _Opened:
        """The handle at the KV host. If the KV host lost it in a restart, opens it again, with nothing saved."""
        if self._link is not None and kv_id in self._on_link:
            return self._handles[kv_id]
        before = self._handles.get(kv_id)
        opened, _, _ = self._ask_to_open(messages.OpenKV((), kv_id, self.layout, before.epoch if before else 0, True))
        if before is not None:
            cache.saved[before.versions != opened.versions] = 0
        else:
            cache.saved[:] = 0
        self._handles[kv_id] = opened
        return opened

    def _ask_to_open(self, header: messages.OpenKV) -> tuple[_Opened, np.ndarray, np.ndarray]:
        frame = self.ask(Operation.OPEN_KV, header)
        assert self._link is not None
        versions, positions, texts = (self._link.decode(frame, index).numpy().astype(np.int64) for index in range(3))
        self._on_link.add(header.kv_id)
        return _Opened(frame.header_as(messages.KVOpened).epoch, versions), positions, texts


@contextlib.contextmanager
def _hurried(link: Link, until_s: float | None) -> Iterator[None]:
    """A frame must begin, and be whole but for its length at 1 MiB/s, until a time of CLOCK_MONOTONIC."""
    if until_s is None:
        yield
        return
    usual, left_s = link.timeouts, until_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineError("not all blocks came in time")
    link.timeouts = Timeouts(min(usual.idle_s, left_s), min(usual.frame_s, left_s))
    try:
        yield
    finally:
        link.timeouts = usual


def texts_of(tokens: np.ndarray, ends: Sequence[int]) -> dict[int, int]:
    """By end: a digest above 0 of the tokens before it. Two blocks hold the same keys and values only after the same tokens."""
    digest, begin, texts = xxhash.xxh3_64(), 0, {}
    for end in sorted(set(ends)):
        digest.update(np.ascontiguousarray(tokens[begin:end], dtype=np.int64))
        texts[end] = (digest.intdigest() >> 1) or 1
        begin = end
    return texts


def _batches(places: list[list[int]], cache: KVCache) -> Iterator[list[LayerBlock]]:
    """Places of blocks, as many as fit a frame at a time."""
    block_bytes = cache.position_bytes * int(cache.counts.max(initial=1))
    count = max(1, min(_PUT_FRAME_BLOCKS, _PUT_FRAME_BYTES // block_bytes))
    for start in range(0, len(places), count):
        yield [(layer, block) for layer, block in places[start : start + count]]


def _check_blocks(header: messages.Header, cache: KVCache, layer: int, wanted: list[int], takes_lossy: bool) -> None:
    """FrameError unless a frame brings the blocks that were requested, with all their filled positions, unchanged if they must be."""
    if not isinstance(header, messages.KVBlocks) or header.layer != layer or header.blocks != tuple(wanted):
        raise FrameError("blocks", f"KV blocks came for another place than the requested blocks of layer {layer}")
    if len(header.tensors) != len(wanted):
        raise FrameError("blocks", f"{len(header.tensors)} tensors came for {len(wanted)} KV blocks")
    dtype = cache.pool.dtype
    for tensor, block in zip(header.tensors, wanted, strict=True):
        begin, end = cache.bounds(block)
        positions = tensor.shape[3] if len(tensor.shape) == 5 else 0
        if tensor.cls is not TensorClass.KV or tensor.dtype is not dtype or tensor.shape != cache.shape.block(positions):
            raise FrameError("blocks", f"a KV block of {tensor.dtype.name} {tensor.shape} came for a cache of {dtype.name} {cache.shape}")
        if positions < end - begin:
            raise FrameError("blocks", f"a KV block of {positions} positions came for {end - begin} filled ones")
        if not takes_lossy and tensor.codec not in _EXACT:
            raise FrameError("blocks", f"a KV block came in codec number {tensor.codec}, and this session takes exact codecs alone")
