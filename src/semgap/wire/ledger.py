"""The ledger: counts every frame once, by direction, class, operation and kind, and reconciles both ends with the kernel."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from semgap.tensors import TensorClass
from semgap.wire.messages import Kind, Operation, TensorHeader


class Direction(enum.StrEnum):
    """UP: from client to worker, from worker to KV host, from host memory to device."""

    UP = "up"
    DOWN = "down"

    @property
    def opposite(self) -> Direction:
        return Direction.DOWN if self is Direction.UP else Direction.UP


class LinkKind(enum.StrEnum):
    """MEMORY: between the KV pool and its shadow if both are in host memory: plain copies, which on a GPU would cross PCIe."""

    NETWORK = "network"
    PCIE = "pcie"
    MEMORY = "memory"


HEADER_CLASS = "header"  # the row of a frame's prefix and header, and of the count of frames
TLS_CLASS = "tls"  # the row of what TLS adds to frames: its records' headers and tags, and its handshake, which the first frame has


class Row(msgspec.Struct):
    """One line of the ledger. tensor_bytes are before the codec, payload_bytes after it; frame bytes are payload + header bytes.

    The row of class 'header' holds frames, round trips and header bytes; the rows of the tensors' classes hold their bytes. A row of class
    'tls' holds as header bytes what TLS added.
    """

    link: LinkKind
    direction: Direction
    operation: str
    kind: str
    tensor_class: str
    frames: int = 0
    round_trips: int = 0
    tensor_bytes: int = 0
    payload_bytes: int = 0
    header_bytes: int = 0
    encode_ns: int = 0
    decode_ns: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return (self.link, self.direction, self.operation, self.kind, self.tensor_class)

    @property
    def counted(self) -> tuple[int, int, int, int]:
        """The counts that both ends must share."""
        return (self.frames, self.tensor_bytes, self.payload_bytes, self.header_bytes)


@dataclass(slots=True)
class Totals:
    """Running sums of one direction, cheap to read between steps. Bytes."""

    tensor: int = 0
    payload: int = 0
    frame: int = 0
    frames: int = 0


class LedgerError(Exception):
    """The two ledgers, or a ledger and its kernel, differ: the trial's byte counts cannot be trusted."""


@dataclass
class Ledger:
    """One side's count. Not thread-safe: one connection, one thread.

    `codec_ns`: time of encoding and decoding for the network. `copied`: payload bytes of all copies between host and device.
    `fallbacks`: the reason of each restore of KV blocks that became a recompute.
    """

    rows: dict[tuple, Row] = field(default_factory=dict)
    up: Totals = field(default_factory=Totals)
    down: Totals = field(default_factory=Totals)
    round_trips: int = 0
    codec_ns: int = 0
    copied: int = 0
    fallbacks: list[str] = field(default_factory=list)

    def count_frame(
        self, direction: Direction, operation: Operation, kind: Kind, tensors: Sequence[TensorHeader], header_bytes: int, tls_bytes: int = 0
    ) -> None:
        """Counts a whole frame, after its last byte went to or came from the kernel."""
        row = self._row(LinkKind.NETWORK, direction, operation, kind, HEADER_CLASS)
        row.frames += 1
        row.header_bytes += header_bytes
        totals = self.up if direction is Direction.UP else self.down
        totals.frames += 1
        totals.frame += header_bytes
        for tensor in tensors:
            tensor_bytes = tensor.tensor_bytes
            row = self._row(LinkKind.NETWORK, direction, operation, kind, tensor.cls)
            row.tensor_bytes += tensor_bytes
            row.payload_bytes += tensor.nbytes
            totals.tensor += tensor_bytes
            totals.payload += tensor.nbytes
            totals.frame += tensor.nbytes
        if tls_bytes:
            self._row(LinkKind.NETWORK, direction, operation, kind, TLS_CLASS).header_bytes += tls_bytes
            totals.frame += tls_bytes

    def count_round_trip(self, direction: Direction, operation: Operation, kind: Kind) -> None:
        """Counts a request whose answer this side waits for."""
        self._row(LinkKind.NETWORK, direction, operation, kind, HEADER_CLASS).round_trips += 1
        self.round_trips += 1

    def count_codec(
        self,
        direction: Direction,
        operation: Operation,
        kind: Kind,
        cls: TensorClass,
        *,
        encode_ns: int = 0,
        decode_ns: int = 0,
        link: LinkKind = LinkKind.NETWORK,
    ) -> None:
        """Adds this side's time in encoding or decoding tensors of a class."""
        row = self._row(link, direction, operation, kind, cls)
        row.encode_ns += encode_ns
        row.decode_ns += decode_ns
        if link is LinkKind.NETWORK:
            self.codec_ns += encode_ns + decode_ns

    def count_copy(
        self,
        direction: Direction,
        operation: Operation,
        kind: Kind,
        cls: TensorClass,
        nbytes: int,
        *,
        payload_bytes: int | None = None,
        link: LinkKind = LinkKind.PCIE,
    ) -> None:
        """Counts a copy of a tensor of `nbytes` between host and device (UP: to the device), as `payload_bytes` (None: `nbytes`)."""
        payload = nbytes if payload_bytes is None else payload_bytes
        row = self._row(link, direction, operation, kind, cls)
        row.frames += 1
        row.tensor_bytes += nbytes
        row.payload_bytes += payload
        self.copied += payload

    def copy_rows(self) -> list[Row]:
        """A copy of the rows as they are now."""
        return [msgspec.structs.replace(row) for row in self.rows.values()]

    def _row(self, link: LinkKind, direction: Direction, operation: Operation, kind: Kind, cls: TensorClass | str) -> Row:
        key = (link, direction, operation, kind, cls)
        row = self.rows.get(key)
        if row is None:
            name = cls.name.lower() if isinstance(cls, TensorClass) else cls
            row = self.rows[key] = Row(link, direction, operation.name.lower(), kind.name.lower(), name)
        return row


def frame_bytes(rows: Sequence[Row], direction: Direction) -> int:
    """Bytes of all network frames in a direction, as they went through the socket."""
    return sum(row.payload_bytes + row.header_bytes for row in rows if row.direction == direction and row.link == LinkKind.NETWORK)


def compare_ledgers(client: Sequence[Row], worker: Sequence[Row]) -> None:
    """LedgerError with the differing rows unless both sides counted the same frames and bytes on the network."""
    theirs, ours = _counted(worker), _counted(client)
    differing = [
        f"{'/'.join(key[1:])}: client (frames, tensor, payload, header bytes) {ours.get(key)}, worker {theirs.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise LedgerError("the two ledgers differ:\n  " + "\n  ".join(differing))


def compare_with_kernel(side: str, rows: Sequence[Row], sending: Direction, tcp: Mapping[str, int]) -> None:
    """LedgerError unless `tcp`, the kernel's counters of a drained connection (tcp.tcp_info), equal the ledger to the byte.

    bytes_sent - bytes_retrans are the application's bytes, also under loss (docs/method.md).
    """
    checks = (
        ("sent", frame_bytes(rows, sending), tcp["bytes_sent"] - tcp["bytes_retrans"]),
        ("received", frame_bytes(rows, sending.opposite), tcp["bytes_received"]),
    )
    wrong = [f"{what}: ledger {ours}, kernel {kernel}" for what, ours, kernel in checks if ours != kernel]
    if wrong:
        raise LedgerError(f"the {side}'s ledger and its kernel differ: " + "; ".join(wrong))


def _counted(rows: Sequence[Row]) -> dict[tuple, tuple]:
    return {row.key: row.counted for row in rows if row.link == LinkKind.NETWORK and any(row.counted)}
