"""The KV host: keeps KV blocks for workers, in its own memory, behind the same wire and secret. Loads no torch.

It stores the bytes of a block in any codec and gives them back unchanged. One thread per connection.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from semgap import codecs
from semgap.codecs import Encoded
from semgap.kv.block_store import Block, BlockStore, News
from semgap.kv.prefix_store import NOTHING, Held, PrefixStore
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
from semgap.wire.waiting import Descriptor, ready

_NAME = "semgap kvhost"
ROLE = {"role": "kvhost"}  # a worker's request in the handshake
LEAST_PAYLOAD_BYTES = 16 << 20  # the smallest limit of a frame: under a smaller budget a put is received, refused, and the link goes on


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
            Operation.FOLLOW_KV: self._follow,
            Operation.CANCEL: lambda request: None,  # as any request, it has ended what was followed
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

    def _follow(self, request: Frame) -> None:
        """Streams a handle's layers as their blocks come in, until the last one, or until the worker requests anything else."""
        asked = request.header_as(messages.FollowKV)
        layout = asked.layout
        if layout is None:
            raise Refused("layout", "a handle is followed with the layout of its blocks")
        with self.store.watched(asked.kv_id) as news:
            for layer in range(layout.layers):
                blocks = self._awaited(partial(self.store.layer_of, asked.kv_id, layout, asked.positions, layer), news)
                if blocks is None:
                    break
                header = messages.KVFollowed((), layer, tuple(range(len(blocks))), tuple(block.version for block in blocks))
                self.link.reply(request, header, [_encoded(block.head, block.payload) for block in blocks])
        self.link.reply(request, messages.KVFollowed(), flags=Flag.LAST)

    def _awaited(self, blocks_now: Callable[[], list[Block] | None], news: News) -> list[Block] | None:
        """Blocks, once they are here; None once the worker requests anything else, or is gone. Refused as `blocks_now`, or late."""
        watched: list[Descriptor] = [self.link.sock, news]
        while not self.link.has_input():
            news.clear()
            blocks = blocks_now()
            if blocks is not None:
                return blocks
            if not ready(watched, timeout_s=self.link.timeouts.idle_s)[0]:
                raise Refused("late", f"no block came for {self.link.timeouts.idle_s:.0f} s")
        return None

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
