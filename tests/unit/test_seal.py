"""Seals: a changed byte is noticed, and a file or directory is written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load, save

from semgap.experiment.measure_codecs import sealed_codecs
from semgap.experiment.trial_schemas import TrialResult
from semgap.seal import (
    BLANK,
    KEY,
    SealError,
    fault_of,
    place_of,
    read_sealed,
    require_sealed,
    sealed,
    sealed_json,
    sha256,
    whole_directory,
    write_sealed,
    write_sealed_json,
    write_sealed_npz,
    write_whole,
)

FLIPS, SEED = 300, 17
VALUE = {"b": [1.5e-7, None, float("nan")], "a": {"é": "0" * 64}, "seal_of_nothing": True}


def made(kind: str, directory: Path) -> bytes:
    """A sealed file of each kind."""
    if kind == "npz":
        np.savez(directory / "unsealed.npz", allow_pickle=False, tokens=np.arange(40), others=np.zeros((3, 5), np.float32))
        write_sealed_npz(directory / "sealed.npz", directory / "unsealed.npz")
    makers = {
        "json": lambda: sealed_json(VALUE),
        "npz": lambda: (directory / "sealed.npz").read_bytes(),
        "parquet": lambda: sealed_codecs(pa.table({"ratio": [1.0, 2.5], "codec": ["raw", "zstd"]}), "digest"),
        "safetensors": lambda: sealed(save({"t": np.arange(9.0)}, {KEY: BLANK})),
    }
    return makers[kind]()


KINDS = ["json", "npz", "parquet", "safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_of_a_sealed_file_passes(tmp_path: Path, kind: str) -> None:
    data = made(kind, tmp_path)
    assert fault_of(data) is None
    for position in random.Random(SEED).sample(range(8 * len(data)), FLIPS):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert fault_of(bytes(flipped)), f"bit {position}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_or_grew_or_is_twice_there_does_not_pass(tmp_path: Path, kind: str) -> None:
    data = made(kind, tmp_path)
    assert all(fault_of(other) for other in (b"", data[:-1], data[: len(data) // 2], data[1:], data + b"\n", data + data))


def test_a_large_file_is_sealed_and_checked_without_memory_for_its_bytes(tmp_path: Path) -> None:
    size, file = 64 << 20, tmp_path / "large"
    tracemalloc.start()
    try:
        write_sealed(file, lambda path: _write_large(path, size))
        require_sealed(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size // 8
    assert read_sealed(file)[-len(BLANK) :] != BLANK.encode()
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"y")
    with pytest.raises(SealError, match="its seal says sha256"):
        require_sealed(file)


@pytest.mark.parametrize("before", [(1 << 20) - many for many in (0, 1, 6, 11, 12, 13, 40, 76, 77)])
def test_a_seal_is_found_wherever_it_lies_in_a_large_file(tmp_path: Path, before: int) -> None:
    content = b"x" * before + BLANK.encode() + b"y" * (1 << 20)
    write_sealed(tmp_path / "file", lambda path: path.write_bytes(content))
    place = before + len(BLANK) - 64
    assert (tmp_path / "file").read_bytes() == content[:place] + sha256(content).encode() + content[place + 64 :] == sealed(content)
    require_sealed(tmp_path / "file")
    (tmp_path / "two").write_bytes(b"x" * before + b"semgap-seal:" + sealed(BLANK.encode()))
    with pytest.raises(SealError, match="2 seals"):
        require_sealed(tmp_path / "two")


def test_a_file_that_is_cut_while_it_is_checked_is_named_and_ends_no_process(tmp_path: Path) -> None:
    file, size = tmp_path / "file", 16 << 20
    _write_large(file, size)
    code = (
        "from pathlib import Path; from semgap.seal import SealError, require_sealed\n"
        "for _ in range(20):\n"
        "    try:\n"
        f"        require_sealed(Path({str(file)!r}))\n"
        "    except SealError as error:\n"
        "        print(error)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as checking:
        while checking.poll() is None:
            for length in (0, size):
                os.truncate(file, length)
                time.sleep(0.001)
        assert checking.returncode == 0 and checking.stdout is not None
        assert checking.stdout.read().count(f"{file} is not as it was written") == 20


@pytest.mark.parametrize("check", [require_sealed, read_sealed])
def test_a_file_that_cannot_be_read_is_named(check: Callable[[Path], object]) -> None:
    with pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):
        check(Path("/proc/self/mem"))


def test_a_large_npz_is_sealed_without_memory_for_its_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "unsealed.npz", allow_pickle=False, logits=np.zeros(16 << 20, np.float32))
    tracemalloc.start()
    try:
        write_sealed_npz(tmp_path / "sealed.npz", tmp_path / "unsealed.npz")
        require_sealed(tmp_path / "sealed.npz")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def _write_large(path: Path, size: int) -> None:
    with path.open("wb") as opened:
        opened.truncate(size)
        opened.seek(size)
        opened.write(BLANK.encode())


@pytest.mark.parametrize("content", [b"", b"no seal", 2 * BLANK.encode(), BLANK.encode()[:-1] + b"1"])
def test_a_file_without_one_blank_seal_is_not_written(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    write_whole(file, b"old")
    with pytest.raises(ValueError, match="holds 'semgap-seal:0"):
        write_sealed(file, lambda path: path.write_bytes(content))
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_bytes() == b"old"
    (tmp_path / "empty").touch()
    with pytest.raises(SealError, match="0 seals"):
        require_sealed(tmp_path / "empty")


def test_a_sealed_file_reads_as_any_other_of_its_kind(tmp_path: Path) -> None:
    assert json.loads(made("json", tmp_path))["a"] == VALUE["a"]
    assert pq.read_table(io.BytesIO(made("parquet", tmp_path)))["codec"].to_pylist() == ["raw", "zstd"]
    assert load(made("safetensors", tmp_path))["t"].tolist() == list(range(9))
    with np.load(io.BytesIO(made("npz", tmp_path))) as arrays:
        assert arrays["tokens"].tolist() == list(range(40)) and arrays["others"].shape == (3, 5)


def test_equal_values_give_equal_bytes_and_a_sealed_value_can_be_sealed_again() -> None:
    again = json.loads(sealed_json({"b": 1, "a": 2}))
    assert sealed_json(again) == sealed_json({"a": 2, "b": 1})
    assert fault_of(sealed_json(again | {"a": 3})) is None


def test_the_seal_is_the_sha256_that_other_tools_compute(tmp_path: Path) -> None:
    data = sealed_json(VALUE)
    said = json.loads(data)[KEY].removeprefix("semgap-seal:")
    blank = data.replace(said.encode(), b"0" * 64)
    found = subprocess.run(["sha256sum"], input=blank, capture_output=True, check=True).stdout.split()[0].decode()
    assert found == said == sha256(blank)
    file = tmp_path / "networks/network=n.json"
    write_sealed_json(file, VALUE)
    said = json.loads(file.read_bytes())[KEY].removeprefix("semgap-seal:")
    placed = file.read_bytes().replace(said.encode(), b"0" * 64) + b"networks/network=n.json"
    assert subprocess.run(["sha256sum"], input=placed, capture_output=True, check=True).stdout.split()[0].decode() == said


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("/a/results/networks/network=n.json", "networks/network=n.json"),
        ("/a=b/results/capacity/model=m/network=n/phase=p.json", "capacity/model=m/network=n/phase=p.json"),
        ("/exactness/model=m/reference_text.npz", "exactness/model=m/reference_text.npz"),
        ("/models/m=3/digest.json", ""),
        ("/results/trials/model=m/trial=0/manifest.json", ""),
        ("/digest.json", ""),
        ("/x=1.json", "//x=1.json"),
    ],
)
def test_the_place_of_a_result_is_its_cell(file: str, place: str) -> None:
    assert place_of(Path(file)) == place


@pytest.mark.parametrize("data", [b"no blank", BLANK.encode() * 2, BLANK.replace("0", "1").encode()])
def test_what_holds_no_single_blank_cannot_be_sealed(data: bytes) -> None:
    with pytest.raises(ValueError, match="holds"):
        sealed(data)


def test_an_altered_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(sealed_json(VALUE).replace(b"1.5e-07", b"0.5e-07"))
    with pytest.raises(
        SealError, match=rf"{file} is not as it was written: its seal says sha256 \w{{64}}, its bytes have \w{{64}}; delete it"
    ):
        read_sealed(file)


@contextmanager
def files_end_at(limit_bytes: int) -> Iterator[None]:
    """As a full disk: no file of this process can grow beyond this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "deep/x.json"
    write_whole(file, b"old")
    with files_end_at(100), pytest.raises(OSError, match="File too large"):
        write_whole(file, b"new" * 1000)
    assert file.read_bytes() == b"old" and list(file.parent.iterdir()) == [file]


def result(rows: int, padding: int = 0) -> TrialResult:
    tables: dict[str, Any] = {
        name: pa.table({"token": np.arange(rows), "latency_s": np.random.rand(rows)}) for name in ("steps", "control")
    }
    return TrialResult(tables, {"rows": rows, "padding": "x" * padding})


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize(
    ("second", "limit_bytes"),
    [(result(5000), 100), (result(5000), 30_000), (result(50, padding=30_000), 20_000)],
    ids=["first", "later", "manifest"],
)
def test_a_full_disk_in_a_second_write_leaves_the_first_trial_whole(tmp_path: Path, second: TrialResult, limit_bytes: int) -> None:
    directory = tmp_path / "trial=1"
    result(10).write(directory)
    before = contents(directory)
    with files_end_at(limit_bytes), pytest.raises(OSError):
        second.write(directory)
    assert contents(directory) == before and list(tmp_path.iterdir()) == [directory]
    second.write(directory)
    assert json.loads((directory / "manifest.json").read_bytes())["rows"] == second.manifest["rows"]
    assert pq.read_table(directory / "steps.parquet").num_rows == second.manifest["rows"]


def test_a_full_disk_in_a_first_write_leaves_no_directory(tmp_path: Path) -> None:
    with files_end_at(100), pytest.raises(OSError):
        result(5000).write(tmp_path / "trial=1")
    assert not list(tmp_path.iterdir())


def test_a_trial_written_again_leaves_no_file_of_the_old_one_and_spares_what_others_put_there(tmp_path: Path) -> None:
    result(10).write(tmp_path / "trial")
    (tmp_path / "trial/notes.txt").write_text("mine")
    result(20).write(tmp_path / "trial")
    found = contents(tmp_path / "trial")
    assert set(found) == {"steps.parquet", "control.parquet", "manifest.json", "notes.txt"} and found["notes.txt"] == b"mine"
    assert json.loads(found["manifest.json"])["files"] == {name: sha256(found[name]) for name in ("control.parquet", "steps.parquet")}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_directory_as_snakemake_makes_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    result(10).write(tmp_path / "trial")
    assert set(contents(tmp_path / "trial")) == {"steps.parquet", "control.parquet", "manifest.json"}


def test_a_writer_that_was_killed_leaves_the_old_directory_and_the_next_one_sweeps_its_rest(tmp_path: Path) -> None:
    result(10).write(tmp_path / "trial")
    before = contents(tmp_path / "trial")
    code = (
        "import os, signal; from pathlib import Path; from semgap.seal import whole_directory\n"
        f"with whole_directory(Path({str(tmp_path / 'trial')!r})) as new:\n"
        "    (new / 'steps.parquet').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert contents(tmp_path / "trial") == before and len(list(tmp_path.iterdir())) == 2
    with whole_directory(tmp_path / "trial") as new:
        assert not list(new.iterdir())
        (new / "manifest.json").write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "trial"]


def test_pages_of_a_trials_tables_have_checksums_that_any_reader_can_verify(tmp_path: Path) -> None:
    result(5000).write(tmp_path / "trial")
    file = tmp_path / "trial/steps.parquet"
    data = bytearray(file.read_bytes())
    for position in range(1000, 1010):
        data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(file, page_checksum_verification=True)
