"""Seals: a result's file is written whole or not at all, and a byte of it that changes later is noticed.

A sealed file holds once `semgap-seal:` and the sha256 (hex) of its own bytes, with 64 zeros in the digest's place: JSON as key `seal`,
Parquet and safetensors in their metadata, npz in the comment of its zip. A trial's manifest also seals its tables: it holds their sha256.

It finds accidents, decayed storage and wishful edits. Whoever computes the hashes anew can forge all of it.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = "seal"
BLANK = "semgap-seal:" + "0" * 64
"""The seal of a file that is still to be sealed."""
REDO = "delete it and run snakemake again"
_MARK = BLANK.rstrip("0").encode()
_DIGITS = 64


class SealError(Exception):
    """A file is not as it was written. The message names it, the fault and the way out."""


def sealed(data: bytes) -> bytes:
    """A file's bytes with their `BLANK` filled in. ValueError unless they hold it once, and no other seal."""
    if data.count(_MARK) != 1 or BLANK.encode() not in data:
        raise ValueError(f"a file to be sealed holds {BLANK!r} once; it holds {data.count(_MARK)} seals")
    return data.replace(BLANK.encode(), _MARK + sha256(data).encode())


def fault_of(data: bytes) -> str | None:
    """The reason why these bytes of a sealed file are not those that were written, or None if they are."""
    if data.count(_MARK) != 1:
        return f"it holds {data.count(_MARK)} seals instead of one"
    begin = data.index(_MARK) + len(_MARK)
    said, whole = data[begin : begin + _DIGITS], memoryview(data)
    digest = hashlib.sha256(whole[:begin])
    digest.update(b"0" * _DIGITS)
    digest.update(whole[begin + _DIGITS :])
    found = digest.hexdigest()
    return None if said == found.encode() else f"its seal says sha256 {said.decode('ascii', 'backslashreplace')}, its bytes have {found}"


def read_sealed(file: Path, way_out: str = REDO) -> bytes:
    """The bytes of a sealed file. SealError if they are not those that were written; OSError if they cannot be read."""
    data = file.read_bytes()
    fault = fault_of(data)
    if fault:
        raise SealError(f"{file} is not as it was written: {fault}; {way_out}")
    return data


def sha256(data: bytes) -> str:
    """The sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as the text of a sealed file."""
    return sealed((json.dumps({**value, KEY: BLANK}, indent=1, sort_keys=True) + "\n").encode())


def sealed_npz(file: Path) -> bytes:
    """The bytes of an .npz, sealed in the comment of its zip."""
    copy = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(copy, "a") as archive:
        archive.comment = BLANK.encode()
    return sealed(copy.getvalue())


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file, and its directory if there is none; a reader, and a machine that crashes, sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(data)
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
