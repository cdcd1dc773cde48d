"""The KV host: keeps KV blocks for workers, in its own memory, behind the same wire and secret. Loads no torch.

It stores the bytes of a block in any codec and gives them back unchanged. One thread per connection.
"""

import json
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from semgap import codecs
from semgap.codecs import Encoded
from semgap.kv.prefix_store import NOTHING, Held, PrefixStore
from semgap.kv.room import Key, Room
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.frames import Flag, Frame, FrameError, Limits, WireError
from semgap.wire.handshake import AuthError, ShakeHands, handshake_of_worker, read_secret, shake_hands_as_client, turn_away
from semgap.wire.ledger import Direction
from semgap.wire.link import Link, Refused, RemoteError, answer_ping, connect, control
from semgap.wire.listen import Signals, accepted, address_of, listen, pin
from semgap.wire.messages import Header, Operation, TensorHeader
from semgap.wire.reconcile import counters
from semgap.wire.tcp import Timeouts
from semgap.wire.waiting import ready

_NAME = "semgap kvhost"
ROLE = {"role": "kvhost"}  # a worker's request in the handshake
LEAST_PAYLOAD_BYTES = 16 << 20  # the smallest limit of a frame: under a smaller budget a put is received, refused, and the link goes on
_MAX_POSITIONS = 1 << 28  # of all layers of a handle
BLOCK_BYTES = 1280
HANDLE_BYTES = 2048
"""What the books of a block, and of a handle, take in memory, rounded up (measured with CPython 3.11: 1,120 and 420 to 1,400 bytes)."""

_MOST_CLAIMED_EPOCH = 1 << 32  # after a restart of this host, by a writer whose handle is new here; each take-over adds 1
_MAX_BLOCKS = 1 << 20  # of all layers of a handle: an answer to an open holds a number for each, stored or not


@dataclass(frozen=True)
class KVHostOptions:
    """The address and limits of a KV host. `budget_bytes` are bytes of blocks and of their books."""

    budget_bytes: int
    listen: str = "127.0.0.1:0"
    secret_file: Path | None = None
    cpus: tuple[int, ...] = ()
    max_connections: int = 64
    tls: bool = False
    idle_s: float = 3600.0
    frame_s: float = 30.0


@dataclass(frozen=True)
class _Block:
    head: TensorHeader
    payload: memoryview
    version: int
    text: int


@dataclass
class _Handle:
    layout: messages.KVLayout
    epoch: int = 1
    version: int = field(default_factory=lambda: secrets.randbits(31))  # random: a restarted host repeats no version
    blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)
    ends_with: object = None  # the connection of its writer, if it is dropped with that

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.layers, -(-self.layout.max_length // self.layout.block)


_ITSELF = (-1, -1)  # the place of a handle's own entry among those of its blocks


class BlockStore:
    """Blocks by handle and place, within a budget in bytes; drops the least recently used. Safe for several threads.

    A block counts with its payload and BLOCK_BYTES, a handle with HANDLE_BYTES. A handle goes after the last of its blocks.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.room = Room(budget_bytes)
        self._handles: dict[bytes, _Handle] = {}
        self._drop_entry = self._drop_of  # one object, not one a block

    @property
    def budget_bytes(self) -> int:
        return self.room.budget_bytes

    @property
    def used_bytes(self) -> int:
        return self.room.used_bytes

    def open(self, request: messages.OpenKV, opener: object = None) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """The writer's epoch, and [layers, blocks] of versions, positions and texts. Refused: unknown, fenced, layout."""
        layout, kv_id = request.layout, request.kv_id
        if layout is None or layout.layers * layout.max_length > _MAX_POSITIONS:
            raise Refused("layout", f"a handle must be opened with the layout of its blocks, up to {_MAX_POSITIONS} layers x positions")
        if layout.layers * -(-layout.max_length // layout.block) > _MAX_BLOCKS:
            raise Refused("layout", f"a handle has more than {_MAX_BLOCKS} layers x blocks; use larger blocks")
        with self.room.lock:
            handle = self._handles.get(kv_id)
            if handle is None:
                if not request.new:
                    raise _unknown(kv_id)
                handle = self._new_handle(request, layout)
            else:
                if 0 < request.epoch < handle.epoch:
                    raise _fenced(kv_id, handle, request.epoch)
                _check_layout(handle, layout)
                _check_claim(request, handle.epoch)
                # A higher epoch was granted before a restart of this host, to which a stale writer came back first.
                handle.epoch = request.epoch or handle.epoch + 1
            handle.ends_with = opener if request.bound else None
            versions, positions, texts = (np.zeros(handle.shape, dtype) for dtype in (np.uint32, np.uint32, np.int64))
            for place, block in handle.blocks.items():
                versions[place], positions[place], texts[place] = block.version, block.head.shape[3], block.text
            self._use(kv_id, handle.blocks)  # or the opener's next blocks would push them out first
            return handle.epoch, versions, positions, texts

    def put(self, request: messages.PutKVBlocks, payloads: Sequence[memoryview]) -> int:
        """Stores blocks and gives their new version. Refused: unknown, fenced, place, layout, budget; then it stores nothing."""
        with self.room.lock:
            handle = self._checked(request.kv_id, request.epoch)
            _check_places(handle, request)
            self.room.require(HANDLE_BYTES + sum(BLOCK_BYTES + payload.nbytes for payload in payloads))
            handle.version += 1
            texts = request.texts or (0,) * len(payloads)
            for place, head, payload, text in zip(request.places, request.tensors, payloads, texts, strict=True):
                self._forget(request.kv_id, place)
                handle.blocks[place] = _Block(head, payload, handle.version, text)
                self.room.keep((request.kv_id, *place), BLOCK_BYTES + payload.nbytes, self._drop_entry)
            self._use(request.kv_id)
            self.room.make()
            return handle.version

    def fetch(self, request: messages.FetchMissing, mask: np.ndarray) -> list[tuple[int, tuple[int, ...], list[_Block]]]:
        """(layer, block indices, blocks) for each layer of the mask, in order. Refused: unknown, fenced, mask, gone."""
        with self.room.lock:
            handle = self._checked(request.kv_id, request.epoch)
            if mask.shape != handle.shape:
                raise Refused("mask", f"a mask of shape {mask.shape} came for a handle of {handle.shape} (layers, blocks)")
            layers = []
            for layer in np.flatnonzero(mask.any(axis=1)).tolist():
                places = [(layer, block) for block in np.flatnonzero(mask[layer]).tolist()]
                gone = [place for place in places if place not in handle.blocks]
                if gone:
                    raise Refused("gone", f"block {gone[0][1]} of layer {gone[0][0]} is not kept here (any more)")
                self._use(request.kv_id, places)
                layers.append((layer, tuple(block for _, block in places), [handle.blocks[place] for place in places]))
            if not layers:
                raise Refused("mask", "the mask selects no block")
            return layers

    def drop(self, request: messages.DropKV) -> None:
        """Drops a handle. Refused: unknown, fenced."""
        with self.room.lock:
            self._checked(request.kv_id, request.epoch)
            self._forget_all(request.kv_id)

    def end(self, opener: object) -> None:
        """Drops the handles whose last opening was by `opener`, and bound."""
        with self.room.lock:
            for kv_id in [kv_id for kv_id, handle in self._handles.items() if handle.ends_with is opener]:
                self._forget_all(kv_id)

    def _new_handle(self, request: messages.OpenKV, layout: messages.KVLayout) -> _Handle:
        self.room.require(HANDLE_BYTES)
        _check_claim(request, 0)
        handle = self._handles[request.kv_id] = _Handle(layout, max(1, request.epoch))
        self.room.keep((request.kv_id, *_ITSELF), HANDLE_BYTES, self._drop_entry)
        self.room.make()
        return handle

    def _checked(self, kv_id: bytes, epoch: int) -> _Handle:
        handle = self._handles.get(kv_id)
        if handle is None or epoch > handle.epoch:  # a handle that was dropped, and that its worker of before opened again
            raise _unknown(kv_id)
        if handle.epoch != epoch:
            raise _fenced(kv_id, handle, epoch)
        return handle

    def _use(self, kv_id: bytes, places: Iterable[tuple[int, int]] = ()) -> None:
        """Moves blocks to the end of the order, and behind them their handle."""
        self.room.use((kv_id, *place) for place in (*places, _ITSELF))

    def _drop_of(self, key: Key) -> None:
        kv_id, *place = key
        if tuple(place) == _ITSELF:  # all its blocks came before it
            self._forget_handle(kv_id)
        else:
            self._forget(kv_id, (place[0], place[1]))

    def _forget(self, kv_id: bytes, place: tuple[int, int]) -> None:
        if self._handles[kv_id].blocks.pop(place, None) is not None:
            self.room.forget((kv_id, *place))

    def _forget_all(self, kv_id: bytes) -> None:
        for place in list(self._handles[kv_id].blocks):
            self._forget(kv_id, place)
        self._forget_handle(kv_id)

    def _forget_handle(self, kv_id: bytes) -> None:
        del self._handles[kv_id]
        self.room.forget((kv_id, *_ITSELF))


def serve_kv(options: KVHostOptions) -> None:
    """Listens until SIGTERM or a worker's shutdown. Prints one line of JSON, {"address": ...}, once workers can connect."""
    secret = read_secret(options.secret_file)
    shake_hands = handshake_of_worker(secret, options.tls)
    listener = listen(options.listen, has_secret=bool(secret))
    if options.cpus:
        pin(options.cpus)
    store = BlockStore(options.budget_bytes)
    prefixes = PrefixStore(store.room)
    with Signals() as signals:
        print(json.dumps({"address": address_of(listener), "pid": os.getpid()}), flush=True)
        threads: list[threading.Thread] = []
        while not signals.stop:
            readable, _ = ready([listener, signals.wakeup], timeout_s=1.0)
            signals.drain()
            threads = [thread for thread in threads if thread.is_alive()]
            arrived = accepted(listener, _NAME) if listener in readable else None
            if arrived is None:
                continue
            sock, peer = arrived
            if len(threads) >= options.max_connections:
                turn_away(sock, f"{options.max_connections} connections are open, the most that this KV host serves", _NAME)
                continue
            connection = _Connection(Link(sock, Direction.DOWN, Timeouts(options.idle_s, options.frame_s)), store, prefixes, signals)
            thread = threading.Thread(target=connection.run, args=(shake_hands, peer), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                turn_away(sock, f"this KV host can serve nobody more now: {error}", _NAME)
                continue
            threads.append(thread)
    listener.close()


@dataclass
class _Connection:
    """One worker's session."""

    link: Link
    store: BlockStore
    prefixes: PrefixStore
    signals: Signals
    _found: Held = NOTHING  # by the last find

    def run(self, shake_hands: ShakeHands, peer: object) -> None:
        """From handshake to goodbye. Every fault of the worker ends here."""
        try:
            shake_hands(self.link, self._grant)
            self._serve()
        except frames.ClosedError:
            pass
        except (WireError, Refused) as error:
            print(f"semgap kvhost: connection of {peer} ended: {error}", file=sys.stderr, flush=True)
            self._say_why(error.code, str(error))
        except Exception as error:
            traceback.print_exc()
            self._say_why("internal", f"{type(error).__name__}: {error}; the KV host's log has the traceback")
        finally:
            self._hold(NOTHING)
            self.store.end(self)
            self.link.close()

    def _grant(self, wanted: dict) -> dict:
        if wanted != ROLE:
            raise Refused("role", "this is a KV host, not a worker; a client must connect to a `semgap serve`")
        limit = max(self.store.budget_bytes, LEAST_PAYLOAD_BYTES)
        self.link.limits = Limits(payload_bytes=limit)
        return {"pid": os.getpid(), "budget_bytes": self.store.budget_bytes, "max_payload_bytes": limit}

    def _serve(self) -> None:
        handlers: dict[Operation, Callable[[Frame], None]] = {
            Operation.OPEN_KV: self._open,
            Operation.PUT_KV_BLOCKS: self._put,
            Operation.FETCH_MISSING_KV_LAYERS: self._fetch,
            Operation.DROP_KV: self._drop,
            Operation.PUT_PREFIX_BLOCK: self._put_prefix_block,
            Operation.FIND_PREFIX: self._find_prefix,
            Operation.FETCH_PREFIX: self._fetch_prefix,
            Operation.GET_NETWORK_COUNTERS: self._counters,
            Operation.PING: partial(answer_ping, self.link),
        }
        while True:
            request = self.link.next_request(_own_memory)
            if request.operation is Operation.SHUTDOWN:
                self.link.reply(request)
                self.link.drain(1.0)
                self.signals.end()
                return
            handler = handlers.get(request.operation)
            if handler is None:
                raise FrameError("operation", f"{request.operation.name.lower()} has no place at a KV host")
            try:
                handler(request)
            except Refused as error:
                self.link.reply_error(request, error.code, str(error))

    def _open(self, request: Frame) -> None:
        asked = request.header_as(messages.OpenKV)
        epoch, *tables = self.store.open(asked, self)
        encoded = [codecs.encode(Tensor.from_numpy(table, TensorClass.CONTROL), "raw") for table in tables]
        self.link.reply(request, messages.KVOpened((), epoch), encoded)

    def _put(self, request: Frame) -> None:
        self.link.reply(request, messages.KVPut((), self.store.put(request.header_as(messages.PutKVBlocks), request.payloads)))

    def _fetch(self, request: Frame) -> None:
        header = request.header_as(messages.FetchMissing)
        if len(header.tensors) != 1 or header.tensors[0].dtype is not DType.U8:
            raise Refused("mask", "a fetch takes one mask, u8 [layers, blocks]")
        layers = self.store.fetch(header, self.link.decode(request, 0).numpy().astype(bool))
        for number, (layer, blocks, held) in enumerate(layers, start=1):
            tensors = [_encoded(block.head, block.payload) for block in held]
            self.link.reply(request, messages.KVBlocks((), layer, blocks), tensors, Flag.LAST if number == len(layers) else 0)

    def _drop(self, request: Frame) -> None:
        self.store.drop(request.header_as(messages.DropKV))
        self.link.reply(request)

    def _put_prefix_block(self, request: Frame) -> None:
        header, tokens = request.header_as(messages.PutPrefixBlock), self._ids(request)
        self.link.reply(request, messages.PrefixBlockPut((), self.prefixes.put(header, tokens, request.payloads[1:])))

    def _find_prefix(self, request: Frame) -> None:
        self._hold(self.prefixes.find(request.header_as(messages.FindPrefix), self._ids(request)))
        found = self._found.blocks
        self.link.reply(
            request, messages.PrefixFound((), len(found), sum(block.payload_bytes for block in found), found[-1].number if found else 0)
        )

    def _fetch_prefix(self, request: Frame) -> None:
        """Streams blocks of the last find, layer by layer, and ends the hold on all of them."""
        wanted = request.header_as(messages.FetchPrefix).blocks
        blocks = self._found.blocks[:wanted]
        if len(blocks) < wanted:
            raise Refused("gone", f"{wanted} blocks of a prefix were asked for, the last find found {len(blocks)}")
        last = blocks[0].layout.layers - 1
        for layer in range(last + 1):
            tensors = [_encoded(block.heads[layer], block.payloads[layer]) for block in blocks]
            header = messages.KVBlocks((), layer, tuple(range(wanted)))
            self.link.reply(request, header, tensors, Flag.LAST if layer == last else 0)
        self._hold(NOTHING)

    def _hold(self, found: Held) -> None:
        """Gives back what the last find found, and holds this instead."""
        self.prefixes.give_back(self._found)
        self._found = found

    def _ids(self, request: Frame) -> np.ndarray:
        """The token ids of a frame, its first tensor. Refused without."""
        if not request.header.tensors or request.header.tensors[0].dtype is not DType.U32:
            raise Refused("place", "a prefix is put and found with its token ids, u32, as the first tensor")
        return self.link.decode(request, 0).numpy()

    def _counters(self, request: Frame) -> None:
        body = msgspec.json.encode(counters(self.link) | self.store.room.counts())
        self.link.reply(request, None, [control(body)])

    def _say_why(self, code: str, message: str) -> None:
        try:
            self.link.reply_error(None, code, message)
            self.link.drain(1.0)
        except (WireError, OSError) as silent:
            print(f"semgap kvhost: the worker did not take the error: {silent}", file=sys.stderr, flush=True)


def _own_memory(operation: Operation, header: Header) -> list[frames.Memory | None]:
    """Memory of their own for blocks, which stay where they were received."""
    if operation not in (Operation.PUT_KV_BLOCKS, Operation.PUT_PREFIX_BLOCK):
        return [None] * len(header.tensors)
    return [memoryview(np.empty(tensor.nbytes, dtype=np.uint8)) for tensor in header.tensors]


def _encoded(head: TensorHeader, payload: memoryview) -> Encoded:
    return Encoded(head.cls, head.codec, head.dtype, head.shape, (payload,), head.nbytes, 0)


def _unknown(kv_id: bytes) -> Refused:
    return Refused("unknown", f"handle {kv_id.hex()} is not kept here; it was dropped, or never saved")


def _fenced(kv_id: bytes, handle: _Handle, epoch: int) -> Refused:
    return Refused("fenced", f"handle {kv_id.hex()} belongs to another worker now (epoch {handle.epoch}, this one's is {epoch})")


def _check_claim(request: messages.OpenKV, known: int) -> None:
    """Refused for an epoch that no host can have granted: a higher one would leave no room for those to come."""
    if request.epoch > max(known, _MOST_CLAIMED_EPOCH):
        raise Refused("fenced", f"epoch {request.epoch} of handle {request.kv_id.hex()} was never granted; open it with epoch 0")


def _check_layout(handle: _Handle, layout: messages.KVLayout) -> None:
    if handle.layout != layout:
        ours, theirs = _described(handle.layout), _described(layout)
        raise Refused("layout", f"the handle's blocks are {ours}, the request's {theirs}; use the same model, dtype and lossy codec")


def _check_places(handle: _Handle, request: messages.PutKVBlocks) -> None:
    layers, blocks = handle.shape
    if not request.places or len(request.places) != len(request.tensors):
        raise Refused("place", f"{len(request.tensors)} blocks came for {len(request.places)} places")
    if request.texts and len(request.texts) != len(request.places):
        raise Refused("place", f"{len(request.texts)} digests of texts came for {len(request.places)} places")
    layout = handle.layout
    for (layer, block), head in zip(request.places, request.tensors, strict=True):
        positions = head.shape[3] if len(head.shape) == 5 else 0
        shape = (1, 2, layout.heads, positions, layout.head_dim)
        if layer >= layers or block >= blocks or not 0 < positions <= layout.block:
            where = f"block {block} of layer {layer} with {positions} positions"
            raise Refused("place", f"{where} does not fit a cache of {(layers, blocks)} (layers, blocks) of {layout.block} positions")
        if head.cls is not TensorClass.KV or head.dtype is not layout.dtype or head.shape != shape:
            raise Refused("layout", f"a block of {head.dtype.name} {head.shape} came; the handle's are {_described(layout)}")


def _described(layout: messages.KVLayout) -> str:
    sizes = f"{layout.layers} layers, {layout.heads} heads of {layout.head_dim}, {layout.max_length} positions in blocks of {layout.block}"
    return f"{layout.dtype.name} of model {layout.model[:12]} ({sizes})"


def connect_kv(address: str, secret: bytes, timeout_s: float, tls: bool = False) -> Link:
    """A worker's authenticated link to the KV host at HOST:PORT. WireError if it does not answer or does not hold the secret."""
    link = connect(address, Timeouts(timeout_s, timeout_s), command="kvhost")
    try:
        granted = shake_hands_as_client(link, secret, ROLE, tls)
    except WireError as error:
        link.close()
        if isinstance(error, AuthError):
            raise AuthError(f"the KV host at {address} does not hold this worker's secret; give both the same token file") from None
        if isinstance(error, RemoteError) and error.code == "session":
            raise RemoteError("role", f"{address} is no KV host; start one with `semgap kvhost`") from None
        raise
    link.limits = Limits(payload_bytes=granted["max_payload_bytes"])
    return link
