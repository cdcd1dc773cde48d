"""Weights that outlive a session, found by content hash: what a client offers and the worker has need not cross again.

The listening process holds one memfd for each upload. A session, being a fork of it, reads from those that were there when it
began, and passes on a new one when it took an upload whole and every hash was true.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import xxhash

HASH_BYTES = 16
_LENGTH_BYTES = 8


class FalseHash(ValueError):
    """Bytes that are not what the client said they are. `code` travels in error frames."""

    code = "hash"


class StoreFull(ValueError):
    """Weights that the worker was asked to keep and has no room for."""

    code = "store"


@dataclass(frozen=True)
class _Upload:
    """One memfd: weights back to back, then an index of them in JSON, then the index's length."""

    fd: int
    nbytes: int
    places: Mapping[bytes, tuple[int, int]]  # hash -> offset, nbytes


@dataclass
class WeightStore:
    """The worker's weights by xxh3-128 hash, within `budget_bytes`; the oldest upload goes first."""

    budget_bytes: int
    _uploads: list[_Upload] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.incoming, self._outgoing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._held = mmap.mmap(-1, _LENGTH_BYTES)  # shared with the sessions, which are forks: what is held now, not when they began

    @property
    def held_bytes(self) -> int:
        """What the listening process holds now, indices included; any of its sessions may ask."""
        return int.from_bytes(self._held[:], "little")

    def has(self, digest: bytes, nbytes: int) -> bool:
        """A weight of that hash and length is here."""
        upload = self._find(digest)
        return upload is not None and upload.places[digest][1] == nbytes

    def read_into(self, digest: bytes, memory: memoryview) -> None:
        """Fills `memory` with the weight of that hash, which must be in the store and as long."""
        upload = self._find(digest)
        if upload is None or upload.places[digest][1] != memory.nbytes:
            raise KeyError(f"no weight of {memory.nbytes} bytes with hash {digest.hex()} is stored")
        offset, done = upload.places[digest][0], 0
        while done < memory.nbytes:
            done += os.preadv(upload.fd, [memory[done:]], offset + done)

    def pass_on(self, digests: Sequence[bytes], memory: Sequence[memoryview]) -> None:
        """Session: hands an upload to the listening process. FalseHash where a weight is not what its hash says."""
        for digest, part in zip(digests, memory, strict=True):
            if xxhash.xxh3_128_digest(part) != digest:
                raise FalseHash(f"a weight of {part.nbytes} bytes does not have the hash {digest.hex()} that it was offered by")
        nbytes = sum(part.nbytes for part in memory)
        if nbytes > self.budget_bytes:
            raise StoreFull(f"weights of {nbytes:,} bytes are more than the worker keeps, {self.budget_bytes:,}; use weights: once")
        fd = os.memfd_create("semgap-weights", os.MFD_CLOEXEC)
        index, offset = [], 0
        for digest, part in zip(digests, memory, strict=True):
            index.append((digest.hex(), offset, part.nbytes))
            offset += _write(fd, part)
        encoded = msgspec.json.encode(index)
        _write(fd, memoryview(encoded))
        _write(fd, memoryview(len(encoded).to_bytes(_LENGTH_BYTES, "little")))
        socket.send_fds(self._outgoing, [b"."], [fd])
        os.close(fd)

    def take_in(self) -> None:
        """Listening process: keeps the upload that `incoming` announces, and drops old ones that it has no room for."""
        _, fds, _, _ = socket.recv_fds(self.incoming, 1, 1)
        self._uploads.append(_read_index(fds[0]))
        while sum(upload.nbytes for upload in self._uploads) > self.budget_bytes:
            os.close(self._uploads.pop(0).fd)
        self._held[:] = sum(upload.nbytes for upload in self._uploads).to_bytes(_LENGTH_BYTES, "little")

    def _find(self, digest: bytes) -> _Upload | None:
        return next((upload for upload in reversed(self._uploads) if digest in upload.places), None)


def _read_index(fd: int) -> _Upload:
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, size - _LENGTH_BYTES), "little")
    index = msgspec.json.decode(os.pread(fd, length, size - _LENGTH_BYTES - length), type=list[tuple[str, int, int]])
    return _Upload(fd, size, {bytes.fromhex(digest): (offset, nbytes) for digest, offset, nbytes in index})


def _write(fd: int, data: memoryview) -> int:
    done = 0
    while done < data.nbytes:
        done += os.write(fd, data[done:])
    return done
