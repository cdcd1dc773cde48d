"""Weights that outlive a session, found by content hash, so that weights that the worker holds need not cross again.

An upload is one file: weights back to back, then their index in JSON, then the index's length. It is written and hashed as its bytes
arrive. Without a directory the listening process holds it as a memfd. A session is a fork of that process: it reads the uploads that
existed when it began, and passes on a new one once it has come whole and every hash is true. In a directory the upload is a file, which
later workers find as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import psutil
import xxhash

from semgap.processes.machine import memory_left_bytes
from semgap.wire.frames import Sink

HASH_BYTES = 16
_LENGTH_BYTES = 8
_MOST_UPLOADS = 64  # kept at a time: each is a descriptor of the listening process, or a file that sessions open
_WRITE_BYTES = 4 << 20
_READ_BYTES = 1 << 19  # hashed while still in the core's cache
_SUFFIX, _PARTIAL = ".weights", ".partial"


class FalseHash(ValueError):
    """Received bytes do not have the hash of the client's offer. `code` travels in error frames."""

    code = "hash"


class StoreFull(ValueError):
    """The worker has no room to keep the weights."""

    code = "store"


@dataclass(frozen=True)
class _Upload:
    fd: int
    nbytes: int
    extents: Mapping[bytes, tuple[int, int]]  # hash -> offset, nbytes
    path: Path | None = None


@dataclass
class WeightStore:
    """The worker's weights by xxh3-128 hash, within `budget_bytes` and _MOST_UPLOADS; the least recently used upload is dropped first.

    `directory` keeps them as files, for later workers too. Any number of workers may share it.
    """

    budget_bytes: int
    directory: Path | None = None
    _uploads: list[_Upload] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.incoming, self._outgoing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._held = mmap.mmap(-1, _LENGTH_BYTES)  # shared with the sessions, which are forks: they see the present value
        if self.directory:
            self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def held_bytes(self) -> int:
        """Bytes held now, indices included; also valid in a session."""
        if self.directory:
            return _total(_found(self.directory))
        return int.from_bytes(self._held[:], "little")

    def refresh(self) -> None:
        """Session: opens uploads that are new in the directory."""
        if not self.directory:
            return
        known = {upload.path for upload in self._uploads}
        for path in sorted(_found(self.directory)):
            if path not in known:
                self._open(path)

    def has(self, digest: bytes, nbytes: int) -> bool:
        """True if a weight of that hash and length is here."""
        upload = self._find(digest)
        return upload is not None and upload.extents[digest][1] == nbytes

    def read_into(self, digest: bytes, sink: Sink) -> bool:
        """Fills `sink` with the weight of that hash and of the sink's length. False if the stored bytes are damaged: the store then drops
        the whole upload.
        """
        upload = self._find(digest)
        if upload is None or upload.extents[digest][1] != sink.nbytes:
            raise KeyError(f"the store has no weight of {sink.nbytes} bytes with hash {digest.hex()}")
        offset, done, state = upload.extents[digest][0], 0, xxhash.xxh3_128()
        while done < sink.nbytes:
            window = sink.window()[:_READ_BYTES]
            got = _read(upload.fd, window, offset + done)
            if not got:
                break
            state.update(window[:got])
            sink.took(got)
            done += got
        if state.digest() == digest:
            with contextlib.suppress(OSError):  # another user's file
                os.utime(upload.fd)  # marks it as used
            return True
        self._drop(upload, f"weight {digest.hex()} in it is damaged")
        return False

    def require_budget(self, nbytes: int) -> None:
        """StoreFull if the budget is less than `nbytes`."""
        if nbytes > self.budget_bytes:
            raise StoreFull(f"weights of {nbytes:,} bytes are more than the worker keeps, {self.budget_bytes:,}; use weights: once")

    def begin(
        self, digests: Mapping[int, bytes], sizes: Mapping[int, int], slot_bytes: int | None = None, io_cpus: Sequence[int] = ()
    ) -> Draft:
        """Session: a new upload, of weights by number. StoreFull if memory or disk has too little room.

        A thread of its own writes it, on cores `io_cpus` (none: those of the process), out of the memory that receives it. If that is
        a staging slot, which is filled again after the other slot, `slot_bytes` is its size.
        """
        nbytes = sum(sizes.values())
        if self.directory is None:
            _require_free(nbytes, memory_left_bytes(), "memory")
            fd, keep, file = os.memfd_create("semgap-weights", os.MFD_CLOEXEC), self._pass_on, None
        else:
            fd, file = _new_file(self.directory, nbytes, self.budget_bytes)
            keep = partial(_publish, file, self.budget_bytes)
        return Draft(_Writer(fd, io_cpus), digests, sizes, keep, file, slot_bytes)

    def take_in(self) -> None:
        """Listening process: keeps the upload that `incoming` announces; drops the least recently used ones over the budget, or over
        _MOST_UPLOADS.
        """
        _, fds, _, _ = socket.recv_fds(self.incoming, 1, 1)
        if not fds:
            print("semgap worker: an upload was not kept: no descriptor is free for it", file=sys.stderr, flush=True)
            return
        self._uploads.append(_read_index(fds[0]))
        self._uploads.sort(key=lambda upload: os.fstat(upload.fd).st_mtime_ns)  # sessions mark what they use
        while len(self._uploads) > _MOST_UPLOADS or sum(upload.nbytes for upload in self._uploads) > self.budget_bytes:
            os.close(self._uploads.pop(0).fd)
        self._held[:] = sum(upload.nbytes for upload in self._uploads).to_bytes(_LENGTH_BYTES, "little")

    def _pass_on(self, fd: int, name: str) -> None:
        socket.send_fds(self._outgoing, [name.encode()[:1]], [fd])

    def _open(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # another worker made room
            return
        try:
            self._uploads.append(_read_index(fd, path))
        except (ValueError, msgspec.MsgspecError, OSError) as error:
            self._drop(_Upload(fd, 0, {}, path), f"its index cannot be read: {error}")

    def _drop(self, upload: _Upload, why: str) -> None:
        print(f"semgap worker: drops {upload.path or 'an upload'}: {why}", file=sys.stderr, flush=True)
        if upload in self._uploads:
            self._uploads.remove(upload)
        os.close(upload.fd)
        if upload.path:
            upload.path.unlink(missing_ok=True)

    def _find(self, digest: bytes) -> _Upload | None:
        return next((upload for upload in reversed(self._uploads) if digest in upload.extents), None)


class Draft:
    """An upload on its way into the store, hashed and written as it arrives."""

    def __init__(
        self,
        writer: _Writer,
        digests: Mapping[int, bytes],
        sizes: Mapping[int, int],
        keep: Callable[[int, str], None],
        file: Path | None,
        slot_bytes: int | None,
    ) -> None:
        self._writer, self._digests, self._keep, self._file = writer, digests, keep, file
        self._slot_bytes = slot_bytes
        self._states: dict[int, xxhash.xxh3_128] = {}
        self._extents: dict[int, tuple[int, int]] = {}
        self._end = 0
        for index, nbytes in sizes.items():
            self._extents[index] = (self._end, nbytes)
            self._end += nbytes

    def through(self, index: int, sink: Sink) -> Sink:
        """A sink that passes weight `index` on to `sink` and keeps a copy, or `sink` itself if the weight is not in this upload."""
        if index not in self._extents:
            return sink
        state = self._states[index] = xxhash.xxh3_128()
        return _Copying(sink, state, self._writer, self._extents[index][0], self._slot_bytes)

    def finish(self) -> None:
        """Keeps the upload for later sessions. FalseHash if a weight has another hash, StoreFull if writing failed."""
        try:
            for index, digest in self._digests.items():
                if index not in self._states or self._states[index].digest() != digest:
                    nbytes = self._extents[index][1]
                    raise FalseHash(f"a weight of {nbytes} bytes does not have the hash {digest.hex()} of its offer")
            encoded = msgspec.json.encode([(digest.hex(), *self._extents[index]) for index, digest in self._digests.items()])
            self._writer.put(memoryview(encoded + len(encoded).to_bytes(_LENGTH_BYTES, "little")), self._end)
            self._writer.wait()
            self._keep(self._writer.fd, xxhash.xxh3_128_hexdigest(encoded))
            self._file = None
        except OSError as error:
            raise StoreFull(f"the weights could not be kept: {error}; use weights: once") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Gives up an unfinished upload."""
        if self._file:
            self._file.unlink(missing_ok=True)
        self._file = None
        self._writer.close()


class _Copying:
    """A wire.Sink that passes bytes on to another sink, and has the writer copy them."""

    def __init__(self, sink: Sink, state: xxhash.xxh3_128, writer: _Writer, offset: int, slot_bytes: int | None) -> None:
        self.nbytes = sink.nbytes
        self._sink, self._state, self._writer, self._offset = sink, state, writer, offset
        self._slot_bytes = slot_bytes
        self._window, self._filled, self._done = memoryview(b""), 0, 0

    def window(self) -> memoryview:
        if not self._filled:
            if self._slot_bytes is not None:
                self._writer.wait(self._slot_bytes)  # the rest then lies in the other slot, or before this part of the slot
            self._window = self._sink.window()[:_WRITE_BYTES]
        return self._window[self._filled :]

    def took(self, count: int) -> None:
        self._state.update(self._window[self._filled : self._filled + count])
        self._filled += count
        if self._filled == self._window.nbytes or self._done + self._filled == self.nbytes:
            self._writer.put(self._window[: self._filled], self._offset + self._done)
            self._sink.took(self._filled)
            self._done += self._filled
            self._filled = 0


class _Writer:
    """Writes into a file from a thread of its own, in order."""

    def __init__(self, fd: int, cpus: Sequence[int]) -> None:
        self.fd = fd
        pin = partial(os.sched_setaffinity, 0, tuple(cpus)) if cpus else None  # of the thread alone
        self._thread = ThreadPoolExecutor(1, "weights", pin)
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0

    def put(self, data: memoryview, offset: int) -> None:
        """Enqueues `data`, which must not change until `wait` has covered it."""
        self._pending.append((self._thread.submit(_write, self.fd, data, offset), data.nbytes))
        self._pending_bytes += data.nbytes

    def wait(self, unwritten_bytes: int = 0) -> None:
        """Waits until at most so many bytes are unwritten. OSError if writing failed."""
        while self._pending_bytes > unwritten_bytes:
            written, nbytes = self._pending[0]
            written.result()
            self._pending.popleft()
            self._pending_bytes -= nbytes

    def close(self) -> None:
        """Gives up unwritten bytes."""
        self._thread.shutdown(cancel_futures=True)
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def _read_index(fd: int, path: Path | None = None) -> _Upload:
    """The upload in a file. ValueError, MsgspecError or OSError if the file holds none."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, max(0, size - _LENGTH_BYTES)), "little")
    if size < _LENGTH_BYTES + length:
        raise ValueError(f"{size} bytes with an index of {length}")
    end = size - _LENGTH_BYTES - length
    index = msgspec.json.decode(os.pread(fd, length, end), type=list[tuple[str, int, int]])
    if any(offset < 0 or nbytes < 0 or offset + nbytes > end for _, offset, nbytes in index):
        raise ValueError("it names bytes outside of the file")
    return _Upload(fd, size, {bytes.fromhex(digest): (offset, nbytes) for digest, offset, nbytes in index}, path)


def _read(fd: int, window: memoryview, offset: int) -> int:
    """Bytes read; 0 at the end of the file or if reading fails."""
    try:
        return os.preadv(fd, [window], offset)
    except OSError:
        return 0


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwrite(fd, data[done:], offset + done)


def _require_free(nbytes: int, free: int, where: str) -> None:
    if nbytes > free:
        raise StoreFull(f"the worker cannot keep weights of {nbytes:,} bytes: {where} has {free:,} bytes free; use weights: once")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time change a directory."""
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _found(directory: Path) -> dict[Path, os.stat_result]:
    """The complete uploads in a directory; another worker may remove them at any time."""
    found = {}
    for path in directory.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat()
    return found


def _total(found: Mapping[Path, os.stat_result]) -> int:
    return sum(stat.st_size for stat in found.values())


def _new_file(directory: Path, nbytes: int, budget_bytes: int) -> tuple[int, Path]:
    """An unfinished upload in a directory, after making room. It is locked while open, so that no worker takes it for an orphan."""
    with _locked(directory):
        _remove_orphans(directory)
        _make_room(directory, budget_bytes - nbytes)
        _require_free(nbytes, shutil.disk_usage(directory).free, str(directory))
        fd, file = tempfile.mkstemp(_PARTIAL, dir=directory)
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd, Path(file)


def _publish(file: Path, budget_bytes: int, fd: int, name: str) -> None:
    with _locked(file.parent):
        file.replace(file.with_name(f"{name}{_SUFFIX}"))
        _make_room(file.parent, budget_bytes)


def _make_room(directory: Path, budget_bytes: int) -> None:
    """Removes the least recently used uploads until at most `budget_bytes` and _MOST_UPLOADS are held. Sessions that read a removed file
    read on.
    """
    found = _found(directory)
    for path, _ in sorted(found.items(), key=lambda item: item[1].st_mtime_ns):
        if _total(found) <= budget_bytes and len(found) <= _MOST_UPLOADS:
            return
        path.unlink(missing_ok=True)
        del found[path]


def _remove_orphans(directory: Path) -> None:
    """Removes the unfinished uploads of killed workers."""
    for path in directory.glob(f"*{_PARTIAL}"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def upload_budget(directory: Path | None) -> int:
    """The default budget in bytes: a quarter of this machine's memory; for a directory, half of its uploads and its disk's free space."""
    if directory is None:
        return psutil.virtual_memory().total // 4
    directory.mkdir(parents=True, exist_ok=True)
    return (shutil.disk_usage(directory).free + _total(_found(directory))) // 2
