"""Operations and their headers: array-encoded structs, one type per operation and direction."""

import enum
from typing import Annotated

import msgspec

from semgap.tensors import DType, TensorClass, nbytes_of


class Operation(enum.IntEnum):
    """The operation that a frame requests or answers. Numbers never change meaning."""

    HELLO = 1
    OFFER_WEIGHTS = 2
    PUT_WEIGHTS = 3
    FORWARD = 4
    DECODE_WINDOW = 5
    CANCEL = 6
    EVICT = 7
    RELEASE = 8
    GET_NETWORK_COUNTERS = 9
    TELEMETRY = 10
    PING = 11
    SHUTDOWN = 12
    RESTORE = 13
    FLUSH = 14
    ATTACH = 15
    OPEN_KV = 16  # from here on: from a worker to a KV host
    PUT_KV_BLOCKS = 17
    FETCH_MISSING_KV_LAYERS = 18
    DROP_KV = 19
    DECODE_ALONE = 20  # to a worker
    ADVANCE = 21  # to a worker whose engine serves many requests at once
    GET_BATCHES = 22
    PING_KV_HOST = 23  # to a worker
    PUBLISH = 24
    PUT_PREFIX_BLOCK = 25  # from here on: from a worker to a KV host
    FIND_PREFIX = 26
    FETCH_PREFIX = 27
    HAND_OVER = 28  # to a worker whose handle another one goes on with
    EXPECT = 29  # to that other one
    FOLLOW_KV = 30  # from it to the KV host


class Kind(enum.IntEnum):
    """Why a frame crossed: outside the measured steps, in one, or to save and restore KV blocks."""

    SETUP = 0
    REGULAR = 1
    DELTA = 2


Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class TensorHeader(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One tensor of a frame: shape and dtype before the codec, nbytes after it."""

    cls: TensorClass
    codec: Annotated[int, msgspec.Meta(ge=0, le=255)]
    dtype: DType
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]
    nbytes: Size

    @property
    def tensor_bytes(self) -> int:
        """Bytes before the codec."""
        return nbytes_of(self.dtype, self.shape)


class Header(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The first field of every header: the tensors whose payloads follow, in order."""

    tensors: tuple[TensorHeader, ...] = ()


class ErrorHeader(Header, frozen=True):
    code: str = ""
    message: str = ""


class Hello(Header, frozen=True):
    """One of the four steps of the handshake (handshake.py); `body` is JSON of the requested or the granted session."""

    step: int = 0
    versions: tuple[int, ...] = ()
    nonce: bytes = b""
    mac: bytes = b""
    body: bytes = b""


class WeightSpec(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: DType
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]


class OfferWeights(Header, frozen=True):
    """The model's weights. An offer by hash has one tensor: 16 bytes (xxh3-128) for each weight, in order."""

    weights: tuple[WeightSpec, ...] = ()


class WantWeights(Header, frozen=True):
    """Indices into the offer: the weights that the worker lacks."""

    indices: tuple[Size, ...] = ()


class PutWeights(Header, frozen=True):
    """Tensor i of the frame is weight `indices[i]` of the offer. Only the last frame of an upload is answered."""

    indices: tuple[Size, ...] = ()
    last: bool = False


class Forward(Header, frozen=True):
    """Tokens for `handle` (0: a new one, or none if the cache crosses too) after `position` filled KV positions.

    `request` numbers the request of a new handle: a worker that draws tokens keys its generator with it.
    """

    handle: U32 = 0
    position: Size = 0
    request: U32 = 0


class DecodeWindow(Header, frozen=True):
    """Decodes `count` steps at most: feeds `token` at `position`, then each drawn token. Answered by a stream of token frames.

    The worker drops positions of `handle` beyond `position`: they belong to a cancelled or failed window.
    `follows`: the window goes on where the one before ended, with its last token; `position` and `token` mean nothing then.
    """

    handle: U32 = 0
    position: Size = 0
    token: U32 = 0
    count: Size = 1
    follows: bool = False


class DecodeAlone(Header, frozen=True):
    """Decodes `count` steps over a copy of a handle: feeds `token` at `position`, then each drawn token. The handle stays as it is."""

    handle: U32 = 0
    position: Size = 0
    token: U32 = 0
    count: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1


class DecodedAlone(Header, frozen=True):
    """The drawn tokens, and the time of each step in ns."""

    drawn: Annotated[tuple[U32, ...], msgspec.Meta(max_length=4096)] = ()
    took_ns: Annotated[tuple[Size, ...], msgspec.Meta(max_length=4096)] = ()


class Call(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Feeds `tokens` ids of its frame to a request, after its `position` filled ones, and wants `draws` tokens back.

    With `tokens` 0 it wants more draws of a request whose last drawn token the worker knows. Position 0 begins the request: `most` bounds
    its positions in all, `deadline_us` (0: none) is the time from here to its next token that its user still accepts. After a call that
    `ends`, the worker forgets the request once its draws are out; without draws at once, and a call of it that runs is over.
    """

    request: U32
    position: Size
    tokens: Size = 0
    draws: Size = 1
    ends: bool = False
    most: Size = 0
    deadline_us: Size = 0


class Advance(Header, frozen=True):
    """Calls of several requests, each request at most once. Their token ids follow each other in the frame's one tensor, if any.

    Answered by a stream of `Advanced`, one a step of the engine, until all draws are out. More frames may follow before that.
    """

    calls: Annotated[tuple[Call, ...], msgspec.Meta(min_length=1, max_length=4096)] = ()


class Gained(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The next `tokens` ids of the frame's tensor are of `request`; `last` if no more will come for its call.

    `queued_us`: from the call's arrival at the engine to the first step that ran some of it; `compute_us`: of the steps that ran it.
    """

    request: U32
    tokens: Size
    last: bool = False
    queued_us: Size = 0
    compute_us: Size = 0


class Advanced(Header, frozen=True):
    """The tokens that one step of the engine drew for this session: the ids of all its requests in one tensor, in this order."""

    gained: Annotated[tuple[Gained, ...], msgspec.Meta(max_length=4096)] = ()


class Tokens(Header, frozen=True):
    """A token frame has no header on the wire: its payload is token ids, u16, or u32 under Flag.WIDE."""


class Forwarded(Header, frozen=True):
    handle: U32 = 0


class Release(Header, frozen=True):
    handle: U32 = 0


class Evict(Header, frozen=True):
    """Takes the KV blocks of some layers of a handle off the device."""

    handle: U32 = 0
    layers: Annotated[tuple[U32, ...], msgspec.Meta(max_length=4096)] = ()


class Evicted(Header, frozen=True):
    """Slabs freed, dirty blocks saved before that, and the saved bytes before and after the codec."""

    slabs: Size = 0
    saved_blocks: Size = 0
    saved_tensor_bytes: Size = 0
    saved_payload_bytes: Size = 0


class Restore(Header, frozen=True):
    """Brings a handle's missing blocks back now, not within its next step."""

    handle: U32 = 0


class Restored(Header, frozen=True):
    """Time of a restore on the worker, in ns; 0 if nothing was missing."""

    took_ns: Size = 0


KVId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class HandingOver(Header, frozen=True):
    """The answer to a hand_over, which promises the session's next new handle to another worker: its name in the KV host."""

    kv_id: KVId = bytes(16)


class Flush(Header, frozen=True):
    """Waits until the KV host has all blocks of a handle that is handed over."""

    handle: U32 = 0


class Flushed(Header, frozen=True):
    """The blocks' bytes before and after the codec, and of frames in both directions; the time of sending them, and how much of it came
    after the prefill, in ns. `kept`: False if the KV host does not have them all, so that the other worker has to compute them;
    `fallback`: why, if they could not be saved, null if the mode chose so.
    """

    tensor_bytes: Size = 0
    payload_bytes: Size = 0
    network_bytes: Size = 0
    sent_ns: Size = 0
    after_ns: Size = 0
    kept: bool = True
    fallback: str | None = None


class Expect(Header, frozen=True):
    """Fetches the blocks of `kv_id`, which another worker computes, as they reach the KV host: `positions` of them, for an `attach`."""

    kv_id: KVId = bytes(16)
    positions: Size = 0


class Attach(Header, frozen=True):
    """Opens the KV host's `kv_id` as a handle here, and fences off its previous holder. All its tokens go along: the worker does not
    use blocks of other tokens. `recompute`: there is no `kv_id`; the tokens are computed with the next step.
    """

    kv_id: KVId = bytes(16)
    request: U32 = 0
    recompute: bool = False


class Attached(Header, frozen=True):
    """`missing_blocks` must be fetched or computed."""

    handle: U32 = 0
    missing_blocks: Size = 0


_Sizes = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Positions = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 28)]
_Text = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
MODEL_ID_CHARS = 128


class KVLayout(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The format of a cache's blocks, which worker and KV host must share."""

    model: Annotated[str, msgspec.Meta(max_length=MODEL_ID_CHARS)]
    dtype: DType
    layers: _Sizes
    heads: _Sizes
    head_dim: _Sizes
    max_length: _Positions
    block: _Sizes


class OpenKV(Header, frozen=True):
    """Opens `kv_id`. With the `epoch` of an earlier opening, its writer goes on; with 0, the opener becomes its only writer.
    `new`: create it if the KV host does not know it. `bound`: drop it when the connection ends, unless it has another writer then.
    """

    kv_id: KVId = bytes(16)
    layout: KVLayout | None = None
    epoch: Size = 0
    new: bool = True
    bound: bool = False


class KVOpened(Header, frozen=True):
    """`epoch` names the writer. Three tensors [layers, blocks]: each block's version (u32, 0: not here), positions (u32), text (i64)."""

    epoch: Size = 0


class PutKVBlocks(Header, frozen=True):
    """Tensor i of the frame is the block (layer, block) = places[i]; texts[i] digests the tokens up to its end (0: unknown)."""

    kv_id: KVId = bytes(16)
    epoch: Size = 0
    places: Annotated[tuple[tuple[_Index, _Index], ...], msgspec.Meta(max_length=4096)] = ()
    texts: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=4096)] = ()


class KVPut(Header, frozen=True):
    """The new version of all blocks of the put."""

    version: Size = 0


class FetchMissing(Header, frozen=True):
    """One tensor goes along: the mask [layers, blocks], u8. Answered by a stream of KVBlocks, one layer each, in order."""

    kv_id: KVId = bytes(16)
    epoch: Size = 0


class KVBlocks(Header, frozen=True):
    """Tensor i of the frame is block `blocks[i]` of `layer`."""

    layer: _Index = 0
    blocks: Annotated[tuple[_Index, ...], msgspec.Meta(max_length=4096)] = ()


class FollowKV(Header, frozen=True):
    """Answered by a stream of KVFollowed, one layer each, in order, each once the KV host has all blocks of the handle's first `positions`
    in it. The last frame has no blocks. It comes sooner if the worker requests anything else, such as a cancel, which has no answer.
    """

    kv_id: KVId = bytes(16)
    layout: KVLayout | None = None
    positions: Annotated[int, msgspec.Meta(ge=1, le=1 << 28)] = 1


class KVFollowed(KVBlocks, frozen=True):
    """Blocks of a layer, and the version of each."""

    versions: Annotated[tuple[U32, ...], msgspec.Meta(max_length=4096)] = ()


class DropKV(Header, frozen=True):
    kv_id: KVId = bytes(16)
    epoch: Size = 0


class Publish(Header, frozen=True):
    """Keeps the whole blocks of a handle in the KV host by their content: sessions with this one's salt find them by their tokens."""

    handle: U32 = 0


class Published(Header, frozen=True):
    """Blocks of all layers that can be found now, from the handle's first on, of `blocks` whole ones."""

    kept: Size = 0
    blocks: Size = 0


SALT_CHARS = 128
Space = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""Digest of a layout and a salt: blocks are shared within a space, and never between two (kv/prefix_names.py)."""

Name = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""Of a block: a digest of the space and all tokens up to the block's end."""

Chain = Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=2048)]


class PutPrefixBlock(Header, frozen=True):
    """The block `name` after the block whose number is `before` (0: it is the first). Tensor 0 is its own token ids (u32, control), then
    one tensor a layer.
    """

    space: Space = bytes(32)
    layout: KVLayout | None = None
    name: Name = bytes(16)
    before: Size = 0


class PrefixBlockPut(Header, frozen=True):
    """The block's number at the KV host, under which it can be found now; 0 if other tokens have its name."""

    number: Size = 0


class FindPrefix(Header, frozen=True):
    """The names of a text's whole blocks. One tensor goes along: their token ids (u32, control), which the KV host compares.

    It holds the blocks that it finds for this connection until their fetch is answered, the next find, or the connection's end.
    """

    space: Space = bytes(32)
    layout: KVLayout | None = None
    chain: Chain = ()


class PrefixFound(Header, frozen=True):
    """The leading blocks of the chain that are kept, the bytes of their payloads, and the number of the last one (0: there is none)."""

    blocks: Size = 0
    payload_bytes: Size = 0
    last: Size = 0


class FetchPrefix(Header, frozen=True):
    """Requests the first `blocks` blocks of the connection's last find. Answered by a stream of KVBlocks, one layer each, in order."""

    blocks: Annotated[int, msgspec.Meta(ge=1, lt=1 << 28)] = 1


class Ping(Header, frozen=True):
    """Requests `reply_bytes` of filler."""

    reply_bytes: Size = 0


class PingKVHost(Header, frozen=True):
    """Requests a ping of the worker's KV host, with so many bytes of filler up and down that link."""

    up_bytes: Size = 0
    down_bytes: Size = 0


class KVHostPinged(Header, frozen=True):
    """The time of a ping on the worker's clock, in ns."""

    took_ns: Size = 0


class TelemetryRequest(Header, frozen=True):
    """`action`: 'start' (with interval and sources), 'stop' (answered by the samples as Parquet files), or 'clock' (of their stamps)."""

    action: str = "start"
    interval_s: float = 0.1
    sources: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()


class Bodied(Header, frozen=True):
    """A header with a JSON `body`: for reports outside every measured step."""

    body: bytes = b"{}"


REQUEST_HEADERS: dict[Operation, type[Header]] = {
    **dict.fromkeys(Operation, Header),
    Operation.HELLO: Hello,
    Operation.OFFER_WEIGHTS: OfferWeights,
    Operation.PUT_WEIGHTS: PutWeights,
    Operation.FORWARD: Forward,
    Operation.DECODE_WINDOW: DecodeWindow,
    Operation.DECODE_ALONE: DecodeAlone,
    Operation.ADVANCE: Advance,
    Operation.RELEASE: Release,
    Operation.TELEMETRY: TelemetryRequest,
    Operation.PING: Ping,
    Operation.PING_KV_HOST: PingKVHost,
    Operation.EVICT: Evict,
    Operation.RESTORE: Restore,
    Operation.FLUSH: Flush,
    Operation.EXPECT: Expect,
    Operation.ATTACH: Attach,
    Operation.OPEN_KV: OpenKV,
    Operation.PUT_KV_BLOCKS: PutKVBlocks,
    Operation.FETCH_MISSING_KV_LAYERS: FetchMissing,
    Operation.FOLLOW_KV: FollowKV,
    Operation.DROP_KV: DropKV,
    Operation.PUBLISH: Publish,
    Operation.PUT_PREFIX_BLOCK: PutPrefixBlock,
    Operation.FIND_PREFIX: FindPrefix,
    Operation.FETCH_PREFIX: FetchPrefix,
}
REPLY_HEADERS: dict[Operation, type[Header]] = {
    **dict.fromkeys(Operation, Header),
    Operation.HELLO: Hello,
    Operation.OFFER_WEIGHTS: WantWeights,
    Operation.FORWARD: Forwarded,
    Operation.DECODE_ALONE: DecodedAlone,
    Operation.ADVANCE: Advanced,
    Operation.GET_BATCHES: Bodied,
    Operation.TELEMETRY: Bodied,
    Operation.PING_KV_HOST: KVHostPinged,
    Operation.EVICT: Evicted,
    Operation.RESTORE: Restored,
    Operation.HAND_OVER: HandingOver,
    Operation.FLUSH: Flushed,
    Operation.ATTACH: Attached,
    Operation.OPEN_KV: KVOpened,
    Operation.PUT_KV_BLOCKS: KVPut,
    Operation.FETCH_MISSING_KV_LAYERS: KVBlocks,
    Operation.FOLLOW_KV: KVFollowed,
    Operation.PUBLISH: Published,
    Operation.PUT_PREFIX_BLOCK: PrefixBlockPut,
    Operation.FIND_PREFIX: PrefixFound,
    Operation.FETCH_PREFIX: KVBlocks,
}
