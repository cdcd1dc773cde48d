"""The ledger: counts every frame once, by direction, class, operation and kind, and reconciles both ends with the kernel."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from semgap.tensors import TensorClass
from semgap.wire.messages import Kind, Operation, TensorHeader


class Direction(enum.StrEnum):
    """UP is from the client to the worker, from a worker to a KV host, and from host memory to the device."""

    UP = "up"
    DOWN = "down"


class LinkKind(enum.StrEnum):
    """MEMORY: between the KV pool and its shadow where both lie in host memory, so that what would cross PCIe on a GPU is a plain copy."""

    NETWORK = "network"
    PCIE = "pcie"
    MEMORY = "memory"


HEADER_CLASS = "header"  # the row that carries a frame's prefix and header, and the count of frames


class Row(msgspec.Struct):
    """One line of the ledger. tensor_bytes are before the codec, payload_bytes after it; frame bytes are payload + header bytes.

    Frames, round trips and header bytes stand in the row of class 'header', the tensors' bytes in the rows of their classes.
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
        """What both ends must agree on."""
        return (self.frames, self.tensor_bytes, self.payload_bytes, self.header_bytes)


@dataclass(slots=True)
class Totals:
    """Running sums of one direction, cheap to read between steps. Bytes."""

    tensor: int = 0
    payload: int = 0
    frame: int = 0
    frames: int = 0


class LedgerError(Exception):
    """The two ledgers or the kernel's counters differ: the trial's byte counts are not to be believed."""


@dataclass
class Ledger:
    """One side's count. Not thread-safe: one connection, one thread.

    `copied`: payload bytes of all copies between host and device. `fallbacks`: why a restore of KV blocks was given up for a recompute,
    one entry each time.
    """

    rows: dict[tuple, Row] = field(default_factory=dict)
    up: Totals = field(default_factory=Totals)
    down: Totals = field(default_factory=Totals)
    round_trips: int = 0
    copied: int = 0
    fallbacks: list[str] = field(default_factory=list)

    def count_frame(
        self,
        direction: Direction,
        operation: Operation,
        kind: Kind,
        tensors: Sequence[TensorHeader],
        header_bytes: int,
    ) -> None:
        """Counts one whole frame, once, when its last byte was handed to or taken from the kernel."""
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

    def count_round_trip(self, direction: Direction, operation: Operation, kind: Kind) -> None:
        """A frame of this side was sent and its answer awaited."""
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
        """Time that this side spent encoding or decoding tensors of a class."""
        row = self._row(link, direction, operation, kind, cls)
        row.encode_ns += encode_ns
        row.decode_ns += decode_ns

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
        """A copy between host (UP: from it) and device of a tensor of `nbytes`, which took `payload_bytes` (None: as many)."""
        payload = nbytes if payload_bytes is None else payload_bytes
        row = self._row(link, direction, operation, kind, cls)
        row.frames += 1
        row.tensor_bytes += nbytes
        row.payload_bytes += payload
        self.copied += payload

    def copy_rows(self) -> list[Row]:
        """The rows as they are now, independent of what is counted later."""
        return [msgspec.structs.replace(row) for row in self.rows.values()]

    def _row(self, link: LinkKind, direction: Direction, operation: Operation, kind: Kind, cls: TensorClass | str) -> Row:
        key = (link, direction, operation, kind, cls)
        row = self.rows.get(key)
        if row is None:
            name = cls.name.lower() if isinstance(cls, TensorClass) else cls
            row = self.rows[key] = Row(link, direction, operation.name.lower(), kind.name.lower(), name)
        return row


def frame_bytes(rows: Sequence[Row], direction: Direction) -> int:
    """Bytes of all network frames in a direction, as the socket carried them."""
    return sum(row.payload_bytes + row.header_bytes for row in rows if row.direction == direction and row.link == LinkKind.NETWORK)


def compare_ledgers(client: Sequence[Row], worker: Sequence[Row]) -> None:
    """Raises LedgerError with the differing rows unless both sides counted the same frames and bytes on the network."""
    theirs, ours = _counted(worker), _counted(client)
    differing = [
        f"{'/'.join(key[1:])}: client (frames, tensor, payload, header bytes) {ours.get(key)}, worker {theirs.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise LedgerError("the two ledgers differ:\n  " + "\n  ".join(differing))


def compare_with_kernel(side: str, rows: Sequence[Row], sending: Direction, tcp: Mapping[str, int]) -> None:
    """Raises LedgerError unless the kernel's TCP counters of a drained connection equal the ledger to the byte.

    bytes_sent - bytes_retrans is what the application sent, also under loss (docs/method.md). `tcp` comes from link.tcp_info.
    """
    receiving = Direction.DOWN if sending is Direction.UP else Direction.UP
    checks = (
        ("sent", frame_bytes(rows, sending), tcp["bytes_sent"] - tcp["bytes_retrans"]),
        ("received", frame_bytes(rows, receiving), tcp["bytes_received"]),
    )
    wrong = [f"{what}: ledger {ours}, kernel {kernel}" for what, ours, kernel in checks if ours != kernel]
    if wrong:
        raise LedgerError(f"the {side}'s ledger and its kernel differ: " + "; ".join(wrong))


def _counted(rows: Sequence[Row]) -> dict[tuple, tuple]:
    return {row.key: row.counted for row in rows if row.link == LinkKind.NETWORK and any(row.counted)}
