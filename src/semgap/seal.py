"""Seals: a result's file is written whole or not at all, and a byte of it that changes later is noticed.

A sealed file holds once `semgap-seal:` and the sha256 (hex) of its own bytes, with 64 zeros in the digest's place: JSON as key `seal`,
Parquet and safetensors in their metadata, npz in the comment of its zip. A trial's manifest also seals its tables: it holds their sha256.

It finds accidents, decayed storage and wishful edits. Whoever computes the hashes anew can forge all of it.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

KEY = "seal"
BLANK = "semgap-seal:" + "0" * 64
"""The seal of a file that is still to be sealed."""
REDO = "delete it and run snakemake again"
_MARK = BLANK.rstrip("0").encode()
_DIGITS = 64
Content: TypeAlias = bytes | mmap.mmap


class SealError(Exception):
    """A file is not as it was written. The message names it, the fault and the way out."""


def sealed(data: bytes) -> bytes:
    """A file's bytes with their `BLANK` filled in. ValueError unless they hold it once, and no other seal."""
    begin = _blank_digits(data)
    return data[:begin] + sha256(data).encode() + data[begin + _DIGITS :]


def fault_of(data: Content) -> str | None:
    """The reason why these bytes of a sealed file are not those that were written, or None if they are."""
    places = list(_places(data))
    if len(places) != 1:
        return f"it holds {len(places)} seals instead of one"
    (begin,) = places
    with memoryview(data) as whole:
        said = bytes(whole[begin : begin + _DIGITS])
        digest = hashlib.sha256(whole[:begin])
        digest.update(b"0" * _DIGITS)
        digest.update(whole[begin + _DIGITS :])
    found = digest.hexdigest()
    return None if said == found.encode() else f"its seal says sha256 {said.decode('ascii', 'backslashreplace')}, its bytes have {found}"


def _places(data: Content) -> Iterator[int]:
    """Where the digest of each seal begins."""
    at = data.find(_MARK)
    while at >= 0:
        yield at + len(_MARK)
        at = data.find(_MARK, at + 1)


def _blank_digits(data: Content) -> int:
    """Where the digest is to stand. ValueError unless `data` holds `BLANK` once, and no other seal."""
    places = list(_places(data))
    if len(places) != 1 or data[places[0] : places[0] + _DIGITS] != b"0" * _DIGITS:
        raise ValueError(f"a file to be sealed holds {BLANK!r} once; it holds {len(places)} seals")
    return places[0]


def read_sealed(file: Path, way_out: str = REDO) -> bytes:
    """The bytes of a sealed file. SealError if they are not those that were written; OSError if they cannot be read."""
    data = file.read_bytes()
    _require(file, data, way_out)
    return data


def require_sealed(file: Path, way_out: str = REDO) -> None:
    """As `read_sealed`, of a file of any size: takes no memory for its bytes."""
    with _mapped(file) as data:
        _require(file, data, way_out)


def _require(file: Path, data: Content, way_out: str) -> None:
    fault = fault_of(data)
    if fault:
        raise SealError(f"{file} is not as it was written: {fault}; {way_out}")


@contextmanager
def _mapped(file: Path) -> Iterator[Content]:
    """The bytes of a file, which stay there."""
    with file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def sha256(data: Content) -> str:
    """The sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as the text of a sealed file."""
    return sealed((json.dumps({**value, KEY: BLANK}, indent=1, sort_keys=True) + "\n").encode())


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file, and its directory if there is none; a reader, and a machine that crashes, sees the old file or the new one."""
    with _whole(file) as partial:
        partial.write_bytes(data)


def write_sealed(file: Path, make: Callable[[Path], object]) -> None:
    """As `write_whole`, of a file of any size: `make` writes it, with its `BLANK`, at the path that it gets."""
    with _whole(file) as partial:
        make(partial)
        with _mapped(partial) as data:
            begin, digest = _blank_digits(data), sha256(data)
        with partial.open("r+b") as opened:
            opened.seek(begin)
            opened.write(digest.encode())


def write_sealed_npz(file: Path, source: Path) -> None:
    """Writes a copy of the .npz `source`, sealed in the comment of its zip."""

    def copy(partial: Path) -> None:
        shutil.copyfile(source, partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.comment = BLANK.encode()

    write_sealed(file, copy)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """The path at which a file is written, before it takes its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    _sync(file.parent)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """An empty directory beside `directory`, whose files replace it when the block ends. If the block fails, `directory` stays as it was.

    A crash while it is replaced leaves none. Files of the old one that the new one lacks stay; one writer at a time.
    """
    directory = directory.resolve()
    partial, old = (directory.with_name(f".{directory.name}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):  # of a writer that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            _sync(file)
        _replace(directory, partial, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(directory.parent)


def _replace(directory: Path, new: Path, old: Path) -> None:
    """`new` becomes `directory`. Files of the directory that `new` lacks are kept."""
    if not directory.exists() or not any(directory.iterdir()):
        new.rename(directory)
        return
    directory.rename(old)
    new.rename(directory)
    for file in old.iterdir():
        if not (directory / file.name).exists():
            file.rename(directory / file.name)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk. Some file systems cannot wait for a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
