"""Seals: a result's file is written whole or not at all, and a byte of it that changes later is noticed.

A sealed file holds once `semgap-seal:` and the sha256 (hex) of its own bytes, with 64 zeros in the digest's place, and of its `place_of`:
JSON as key `seal`, Parquet and safetensors in their metadata, npz in the comment of its zip. A trial's manifest also seals its tables: it
holds their sha256.

It finds accidents, decayed storage and wishful edits. Whoever computes the hashes anew can forge all of it.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

KEY = "seal"
BLANK = "semgap-seal:" + "0" * 64
"""The seal of a file that is still to be sealed."""
REDO = "delete it and run snakemake again"
_MARK = BLANK.rstrip("0").encode()
_DIGITS = 64
_PIECE_BYTES = 1 << 20  # of a file, which is read and never mapped: a mapped file that is cut or cannot be read kills the process


class SealError(Exception):
    """A file is not as it was written. The message names it, the fault and the way out."""


def place_of(file: Path) -> str:
    """The part of a result's path that says which one it is, as `networks/network=n.json`: another result's file there is noticed.

    Empty for a file that no cell names, for a trial's manifest, which holds its cell, and for a model's digest, which lies anywhere.
    """
    *above, name = file.absolute().parts
    begin = len(above)
    while begin and "=" in above[begin - 1]:
        begin -= 1
    by_cell = "=" in name or begin < len(above)
    return "/".join([*above[max(begin - 1, 0) :], name]) if by_cell and name not in ("manifest.json", "digest.json") else ""


def sealed(data: bytes, place: str = "") -> bytes:
    """The bytes of a file at a `place_of`, with their `BLANK` filled in. ValueError unless they hold it once, and no other seal."""
    begin = _blank_digits(io.BytesIO(data))
    return data[:begin] + sha256(data + place.encode()).encode() + data[begin + _DIGITS :]


def fault_of(data: bytes, place: str = "") -> str | None:
    """The reason why these bytes of a sealed file are not those that were written at that place, or None if they are."""
    return _fault_of(io.BytesIO(data), place)


def _fault_of(file: BinaryIO, place: str) -> str | None:
    places = _places(file)
    if len(places) != 1:
        return f"it holds {len(places)} seals instead of one"
    said, found = _digests(file, places[0], place)
    if said == found.encode():
        return None
    at = f" as {place}" if place else ""
    return f"its seal says sha256 {said.decode('ascii', 'backslashreplace')}, its bytes{at} have {found}"


def _pieces(file: BinaryIO, nbytes: int | None = None) -> Iterator[bytes]:
    """The next `nbytes` of a file, or all that follow; fewer at its end."""
    while piece := file.read(_PIECE_BYTES if nbytes is None else min(nbytes, _PIECE_BYTES)):
        nbytes = None if nbytes is None else nbytes - len(piece)
        yield piece


def _places(file: BinaryIO) -> list[int]:
    """Where the digest of each seal begins."""
    file.seek(0)
    places, end, tail = [], 0, b""
    for piece in _pieces(file):
        window, end = tail + piece, end + len(piece)
        at = window.find(_MARK)
        while at >= 0:
            places.append(end - len(window) + at + len(_MARK))
            at = window.find(_MARK, at + 1)
        tail = window[1 - len(_MARK) :]  # too short for a whole mark
    return places


def _digests(file: BinaryIO, begin: int, place: str) -> tuple[bytes, str]:
    """The digest that stands at `begin`, and the one of the file with zeros there and of its place."""
    file.seek(0)
    digest = hashlib.sha256()
    for piece in _pieces(file, begin):
        digest.update(piece)
    said = file.read(_DIGITS)
    digest.update(b"0" * _DIGITS)
    for piece in _pieces(file):
        digest.update(piece)
    digest.update(place.encode())
    return said, digest.hexdigest()


def _blank_digits(file: BinaryIO) -> int:
    """Where the digest is to stand. ValueError unless `file` holds `BLANK` once, and no other seal."""
    places = _places(file)
    if len(places) == 1:
        file.seek(places[0])
        if file.read(_DIGITS) == b"0" * _DIGITS:
            return places[0]
    raise ValueError(f"a file to be sealed holds {BLANK!r} once; it holds {len(places)} seals")


def read_sealed(file: Path, way_out: str = REDO) -> bytes:
    """The bytes of a sealed file. SealError if they are not those that were written; OSError if they cannot be read."""
    with _named(file):
        data = file.read_bytes()
    _refuse(file, fault_of(data, place_of(file)), way_out)
    return data


def require_sealed(file: Path, way_out: str = REDO) -> None:
    """As `read_sealed`, of a file of any size: takes no memory for its bytes."""
    with _named(file), file.open("rb") as opened:
        fault = _fault_of(opened, place_of(file))
    _refuse(file, fault, way_out)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """An OSError of a read names the file, as one of an open does."""
    try:
        yield
    except OSError as error:
        error.filename = str(file)
        raise


def _refuse(file: Path, fault: str | None, way_out: str) -> None:
    if fault:
        raise SealError(f"{file} is not as it was written: {fault}; {way_out}")


def sha256(data: bytes) -> str:
    """The sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sealed_json(value: Mapping[str, Any], place: str = "") -> bytes:
    """A JSON object as the text of a sealed file at that place."""
    return sealed((json.dumps({**value, KEY: BLANK}, indent=1, sort_keys=True) + "\n").encode(), place)


def write_sealed_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object as `write_whole` does, sealed."""
    write_whole(file, sealed_json(value, place_of(file)))


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file, and its directory if there is none; a reader, and a machine that crashes, sees the old file or the new one."""
    with _whole(file) as partial:
        partial.write_bytes(data)


def write_sealed(file: Path, make: Callable[[Path], object]) -> None:
    """As `write_whole`, of a file of any size: `make` writes it, with its `BLANK`, at the path that it gets."""
    with _whole(file) as partial:
        make(partial)
        with partial.open("r+b") as opened:
            begin = _blank_digits(opened)
            _, digest = _digests(opened, begin, place_of(file))
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
