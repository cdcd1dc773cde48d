"""Every Triton kernel, compiled for GPUs that are not here at the shapes of real models; what ptxas made of it. Nothing runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton import __version__ as triton_version

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks/kernel_table.py"
LAUNCHERS_OF_3_6 = ROOT / "tests/data/triton_3.6.0_driver.py.txt"
REGISTERS, SHARED_BYTES = 128, 16 << 10
TARGETS, DTYPES = {80, 90, 100}, {"float16", "bfloat16", "float32"}
MODELS = {"gpt-j-6b", "llama-3-8b", "smollm2-135m", "gpt2", "qwen3-8b"}
PRODUCTS = ("_project", "_gate", "_merge")
BATCH = {"_place", "_attend_blocks", "_combine_parts", "_activate"}


def _output(kept: Path, *options: str, variable: str = "TRITON_CACHE_DIR") -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), variable: str(kept)}
    done = subprocess.run([sys.executable, str(TABLE), *options], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest) -> Path:
    """What Triton compiled, also in earlier runs: by the content of its source, options and version."""
    return request.config.cache.mkdir("triton")


@pytest.fixture(scope="session")
def compiled(kept: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """One row a kernel of `kernel_table.py resources`; computed once for the same sources and Triton."""
    sources = [*ROOT.glob("src/semgap/engine/*.py"), *ROOT.glob("src/semgap/codecs/*.py"), TABLE, TABLE.with_name("compiled_kernels.py")]
    key = hashlib.sha256(triton_version.encode() + b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
    found = request.config.cache.get("semgap/compiled_kernels", {})
    if found.get("key") != key:
        found = {"key": key, "rows": json.loads(_output(kept, "resources", "--json"))}
        request.config.cache.set("semgap/compiled_kernels", found)
    return found["rows"]


def test_every_kernel_is_there_for_every_model_dtype_and_target(compiled: list[dict[str, Any]]) -> None:
    decoding = [row for row in compiled if row["model"] != "codecs"]
    assert {(row["model"], row["dtype"], row["target"]) for row in decoding} == {
        (model, dtype, target) for model in MODELS for dtype in DTYPES for target in TARGETS
    }
    names = {row["name"] for row in compiled}
    step = {"_embed", "_norm", "_norm_heads", "_attend", "_combine", *PRODUCTS}
    assert names == step | BATCH | {"_split_kernel", "_join_kernel", "_move_kernel"}
    assert {tuple(row[key] for key in ("model", "dtype", "target", "name")) for row in decoding if row["name"] in BATCH} == {
        (model, dtype, target, name) for model in MODELS for dtype in DTYPES for target in TARGETS for name in BATCH
    }
    assert {row["programs"] for row in decoding if row["model"] == "gpt2" and row["name"] == "_attend"} == {12 * 4, 12 * 16}  # both lengths
    heads = {row["shape"] for row in decoding if row["name"] == "_project"}
    assert {"50400 x 4096", "128256 x 4096", "49152 x 576", "50257 x 768", "151936 x 4096"} <= heads


def test_nothing_spills_and_registers_and_shared_memory_are_within_bounds(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["stack_bytes"]] == []
    assert [row for row in compiled if not 0 < row["registers"] <= REGISTERS] == []
    assert [row for row in compiled if row["shared_bytes"] > SHARED_BYTES] == []


def test_a_products_thread_has_4_wide_loads_of_weights_on_their_way_whenever_it_waits(compiled: list[dict[str, Any]]) -> None:
    products = [row for row in compiled if row["name"] in PRODUCTS]
    assert [row for row in products if row["loads_a_wait"] is None or row["loads_a_wait"] < 4] == []


def test_keys_values_and_byte_planes_are_read_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["name"] in ("_attend", "_attend_blocks", *PRODUCTS) and row["wide_loads"] < 3] == []
    planes = [row for row in compiled if row["model"] == "codecs"]
    assert planes and [row for row in planes if row["wide_loads"] < 2 or row["wide_stores"] < 2] == []


def test_a_transposed_merge_has_more_programs_than_an_eighth_of_the_sms(compiled: list[dict[str, Any]]) -> None:
    assert {row["programs"] for row in compiled if row["model"] == "gpt2" and row["name"] == "_merge"} == {96}


def test_without_the_bound_on_registers_loads_wait_for_each_other(kept: Path) -> None:
    """The instrument sees what the bound is for."""
    found = json.loads(
        _output(
            kept, "resources", "--json", "--model", "llama-3-8b", "--target", "90", "--dtype", "float16", "--max-length", "256",
            "--registers", "none",
        )
    )  # fmt: skip
    assert all(row["loads_a_wait"] < 2 for row in found if row["name"] == "_merge")


@pytest.mark.parametrize(("options", "kernels"), [((), 7), (("--batch",), 12)])
def test_an_executor_compiles_all_its_kernels_side_by_side_as_it_is_made_and_keeps_them_where_a_run_says(
    tmp_path: Path, options: tuple[str, ...], kernels: int
) -> None:
    said = _output(tmp_path, "setup", "gpt-j-6b", *options, variable="SEMGAP_KERNEL_CACHE")
    assert re.match(rf"{kernels} kernels and 0 launchers made side by side on \d+ cores, 0 and 0 later;", said), said
    assert len(list(tmp_path.glob("triton/*/*.cubin"))) == kernels


# Stands before the compiler: of a launcher's it notes the start, and waits until another one's has started too, or for 20 s.
COMPILER = """#!/bin/sh
case "$*" in *__triton_launcher*)
  touch {folder}/launcher.$$
  turns=0
  while [ "$(ls {folder} | wc -l)" -lt 2 ] && [ $turns -lt 200 ]; do sleep 0.1; turns=$((turns + 1)); done
  ls {folder} | wc -l >> {seen};;
esac
exec {compiler} "$@"
"""
ON_ONE_CORE = """
import os, runpy, sys
from semgap.processes import machine
os.sched_setaffinity(0, [min(machine.CORES_AT_START)])  # as a trial pins the side that computes
sys.path.insert(0, os.path.dirname(sys.argv[1]))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine has one core")
def test_a_pinned_executor_builds_the_launchers_of_triton_3_6_side_by_side_and_none_later(tmp_path: Path) -> None:
    compiler, folder, seen = shutil.which("gcc"), tmp_path / "started", tmp_path / "seen"
    if compiler is None:
        pytest.skip("no gcc")
    folder.mkdir()
    script = tmp_path / "cc"
    script.write_text(COMPILER.format(folder=folder, seen=seen, compiler=compiler))
    script.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(tmp_path / "cold"), "CC": str(script)}
    command = [sys.executable, "-c", ON_ONE_CORE, str(TABLE), "setup", "gpt-j-6b", "--drivers", str(LAUNCHERS_OF_3_6)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    made = re.match(r"7 kernels and (\d) launchers made side by side on \d+ cores, 0 and 0 later;", done.stdout)
    assert made, done.stdout + done.stderr
    assert len(list(folder.iterdir())) >= int(made[1]) >= 5
    assert int(seen.read_text().split()[0]) >= 2


def test_a_decode_step_is_a_table_whose_bytes_are_all_weights_and_keys_and_values(kept: Path) -> None:
    lines = _output(kept, "step", "gpt-j-6b", "--position", "178").splitlines()
    whole = next(line for line in lines if line.startswith("| all |")).split("|")
    layer = 4 * 4096 * 4096 + 2 * 4096 * 16384 + (3 * 4096 + 16384) + 4096 + 2 * 4096  # products, biases (of q, k, v zeros), the norm
    values = 28 * layer + 50400 * (4096 + 1) + 2 * 4096 + 4096 + 28 * 2 * 178 * 4096  # head, last norm, one embedding, keys and values
    assert float(whole[4].replace(",", "")) == pytest.approx(2 * values / 1e6, abs=0.02)
    assert int(whole[3]) == 28 * 5 + 3
    assert all("not measured" in line for line in lines if line.startswith("| _"))


def test_a_pass_of_16_requests_reads_the_weights_once_and_keys_and_values_of_each(kept: Path) -> None:
    lines = _output(kept, "batch", "gpt-j-6b", "--position", "178").splitlines()
    rows = {int(cells[1]): [float(cell.replace(",", "")) for cell in cells[2:8]] for cells in (line.split("|") for line in lines[4:])}
    assert list(rows) == [1, 2, 4, 8, 16, 32]
    layer = 4 * 4096 * 4096 + 2 * 4096 * 16384 + 16384 + 4096 + 2 * 4096  # products, biases of its own, the norm
    weights = 28 * layer + 50400 * 4096 + 2 * 4096 + 4096  # head without its bias, last norm, one embedding
    for count in (2, 16):
        assert rows[count][2] == pytest.approx(2 * (weights + count * 28 * 2 * 178 * 4096) / 1e6, rel=1e-4)
    assert rows[16][:2] == [2 + 28 * 5, 28 * 6 + 1]  # norm, place, attend, combine, activate; q, k, v, up, out, down
    assert rows[1][1] == 0
