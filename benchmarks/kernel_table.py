"""The registers and memory of every Triton kernel, and the launches of one decode step: tables in Markdown, compiled, not measured.

python benchmarks/kernel_table.py resources [--target 90] [--dtype float16] [--registers none]
python benchmarks/kernel_table.py step gpt-j-6b [--position 178] [--times gpu-check.json]
python benchmarks/kernel_table.py batch gpt-j-6b [--position 178]
TRITON_CACHE_DIR=$(mktemp -d) python benchmarks/kernel_table.py setup gpt-j-6b
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

from compiled_kernels import (
    DTYPES,
    MAX_LENGTHS,
    MODELS,
    TARGETS,
    Compiled,
    Launch,
    Product,
    batch_launches,
    compile_for,
    launches,
    pass_launches,
    plane_launches,
    set_up,
)

from semgap.engine import batch_kernels, kernels
from semgap.engine.graph_batch import SIZES
from semgap.processes.machine import CORES_AT_START

_LATENCY_S = 0.8e-6  # of a load from memory under load: assumed; 4.8 TB/s over 132 SMs then need 29 KB in flight on each
_LAUNCH_S = 1.0e-6  # between two kernels of a graph: assumed
_REGISTERS_AN_SM, _THREADS_AN_SM = 65536, 2048
CHECKED = ("gpt-j-6b", "float16")  # whose kernels gpu-check times


@dataclass(frozen=True)
class Gpu:
    """A device of the estimates: SMs and memory bandwidth, as published."""

    name: str
    target: int
    sms: int
    bytes_per_s: float


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80, 108, 2.04e12),
    "h100": Gpu("H100 SXM", 90, 132, 3.35e12),
    "h200": Gpu("H200 SXM", 90, 132, 4.8e12),
    "b200": Gpu("B200", 100, 148, 8.0e12),
}


def main() -> int:
    """Prints the table that the command asks for."""
    options = _options()
    if options.registers:
        taken = None if options.registers == "none" else int(options.registers)
        kernels.TILES = {name: replace(tile, registers=taken) for name, tile in kernels.TILES.items()}
        kernels._REGISTERS = batch_kernels._REGISTERS = taken
    if options.command == "step":
        times = measured_times(options.times, options.model, options.dtype) if options.times else None
        print(step_table(options.model, options.dtype, options.max_length, options.position, GPUS[options.gpu], times))
        return 0
    if options.command == "batch":
        print(batch_table(options.model, options.dtype, options.max_length, options.position, GPUS[options.gpu]))
        return 0
    if options.command == "setup":
        made = set_up(MODELS[options.model], options.dtype, options.max_length, options.target, options.drivers, options.batch)
        print(
            f"{made.kernels} kernels and {made.launchers} launchers made side by side on {len(CORES_AT_START)} cores, "
            f"{made.later_kernels} and {made.later_launchers} later; the executor took {made.took_s:.2f} s, nothing loaded"
        )
        return 0
    found = list(resources(options.model, options.target, options.dtype, options.max_length))
    before = json.loads(options.beside.read_text()) if options.beside else None
    print(json.dumps(found) if options.json else resource_table(found, before))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("resources", help="registers, stack, shared memory and loads in flight of every kernel")
    table.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    table.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=list(TARGETS), help="compute capabilities, 90 for 9.0")
    table.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    table.add_argument("--max-length", nargs="+", type=int, default=list(MAX_LENGTHS))
    table.add_argument("--json", action="store_true", help="a list of objects in place of the table")
    table.add_argument("--beside", type=Path, help="what --json gave of another tree: cells that differ show both, its own first")
    step = commands.add_parser("step", help="one decode step: kernels, bytes, floor, estimate, and the time measured by gpu-check")
    batch = commands.add_parser("batch", help="one pass over 1 to 32 requests: launches, bytes, floor and estimate")
    for command in (step, batch):
        command.add_argument("model", choices=MODELS)
        command.add_argument("--dtype", choices=DTYPES, default="float16")
        command.add_argument("--max-length", type=int, default=256)
        command.add_argument("--position", type=int, default=178, help="tokens before this one (default: %(default)s)")
        command.add_argument("--gpu", choices=GPUS, default="h200", help="whose bandwidth the estimate takes (default: %(default)s)")
    step.add_argument("--times", type=Path, help="a gpu-check.json, whose kernels' times stand beside the estimate (of gpt-j-6b, float16)")
    setup = commands.add_parser("setup", help="kernels and launchers that an executor makes with itself, and the seconds")
    setup.add_argument("model", choices=MODELS)
    setup.add_argument("--dtype", choices=DTYPES, default="float16")
    setup.add_argument("--max-length", type=int, default=256)
    setup.add_argument("--target", type=int, choices=TARGETS, default=90)
    setup.add_argument("--drivers", type=Path, help="NVIDIA's driver.py of another version of Triton, whose launchers are built")
    setup.add_argument("--batch", action="store_true", help="also those of batches, as in an engine")
    for command in (table, step, batch, setup):
        command.add_argument("--registers", help="the most registers of a thread in place of the tiles' own, or none: ptxas's choice")
    return parser.parse_args()


def resources(models: Iterable[str], targets: Iterable[int], dtypes: Iterable[str], lengths: Iterable[int]) -> Iterable[dict[str, Any]]:
    """One row a kernel that differs: model, dtype, target, its shape and programs, and the fields of `Compiled`."""
    asked: list[tuple[str, str, list[Launch]]] = [("codecs", "all", plane_launches())]
    for model in models:
        for dtype in dtypes:
            of = launches, batch_launches
            asked.append((model, dtype, [each for length in lengths for kind in of for each in kind(MODELS[model], dtype, length)]))
    for target in targets:
        code = iter(compile_for(target, [launch for _, _, launched in asked for launch in launched]))
        for model, dtype, launched in asked:
            seen = set()
            for launch, compiled in zip(launched, code, strict=False):  # the next ones are of the next model
                row = {"model": model, "dtype": dtype, "target": target, "shape": launch.shape, "programs": launch.programs}
                key = (id(compiled), launch.shape, launch.programs)
                if key not in seen:
                    seen.add(key)
                    yield row | asdict(compiled) | {"loads_a_wait": compiled.loads_a_wait}


_COLUMNS = ("programs", "registers", "stack_bytes", "shared_bytes", "loads_a_wait")
_SAME = ("target", "model", "dtype", "name", "shape")


def resource_table(found: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] | None = None) -> str:
    """The rows of `resources` in Markdown, a line for equal ones. With those of another tree `before`, a cell that differs shows both."""
    earlier = {_place(row, before): row for row in before or ()}
    lines = ["| target | model | dtype | kernel | shape | programs | registers | stack (B) | shared (B) | loads in flight |"]
    lines.append("| " + " | ".join(["---"] * 5 + ["---:"] * 5) + " |")
    for row in found:
        was = earlier.get(_place(row, found), row)
        cells = [str(row[key] or "-") for key in _SAME] + [_both(was[key], row[key]) for key in _COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(dict.fromkeys(lines))


def _place(row: dict[str, Any], among: Sequence[dict[str, Any]] | None) -> tuple[Any, ...]:
    """The name of a row in any tree: its kernel and shape, and its number among those that share them."""
    same = [each for each in among or () if all(each[key] == row[key] for key in _SAME)]
    return (*(row[key] for key in _SAME), next(at for at, each in enumerate(same) if each is row))


def _both(was: float | None, now: float | None) -> str:
    old, new = ("-" if value is None else f"{value:.1f}".removesuffix(".0") for value in (was, now))
    return new if old == new else f"{old} -> {new}"


@dataclass(frozen=True)
class Times:
    """What gpu-check's part `kernels` profiled: seconds a step of each of our kernels, by name, and where."""

    measured: str
    seconds: dict[str, float]


def measured_times(path: Path, model: str, dtype: str) -> Times:
    """Reads a gpu-check.json. SystemExit if it has no times of this model on a GPU."""
    report = json.loads(path.read_text())
    found = report["facts"].get("kernels")
    if (model, dtype) != CHECKED:
        sys.exit(f"--times: gpu-check measures {' in '.join(CHECKED)}, not {model} in {dtype}; leave --times out")
    if report["rehearsal"]:
        sys.exit(f"--times: {path} is of a rehearsal on the CPU; take that of `make gpu-check` on a GPU")
    if not found:
        sys.exit(f"--times: {path} has no times of kernels, since part kernels did not get that far; see its `parts`")
    ours = {name for name in vars(kernels) if name.startswith("_") and hasattr(getattr(kernels, name), "arg_names")}
    seconds = {row["name"]: row["ms"] / 1e3 for row in found if row["name"] in ours}
    return Times(f"{report['device']}, {report['utc'][:10]}, commit {report['git'][:12]}", seconds)


def step_table(model: str, dtype: str, max_length: int, position: int, gpu: Gpu, times: Times | None = None) -> str:
    """One decode step with its draw, a row a kernel and shape, in Markdown."""
    launched = launches(MODELS[model], dtype, max_length)
    groups: dict[tuple[str, str], list[tuple[Launch, Compiled]]] = {}
    for launch, compiled in zip(launched, compile_for(gpu.target, launched), strict=True):
        groups.setdefault((launch.name, launch.shape), []).append((launch, compiled))
    measured = times.seconds if times else {}
    sharing = Counter(name for name, _ in groups)
    where = f" Measured on {times.measured}." if times else ""
    lines = [f"{model}, {dtype}, position {position}, {gpu.name}: {gpu.bytes_per_s / 1e12:.2f} TB/s, {gpu.sms} SMs.{where}", ""]
    lines += ["| kernel | shape | launches | bytes to read (MB) | floor (us) | estimate (us) | measured (us) |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    totals = [0.0, 0.0, 0.0, 0.0]
    for (name, shape), each in groups.items():
        nbytes = sum(launch.bytes_to_read(position) for launch, _ in each)
        numbers = [len(each), nbytes, nbytes / gpu.bytes_per_s, sum(estimate_s(*one, position, gpu) for one in each)]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        took = f"{1e6 * measured[name]:.0f}" + (" (all shapes)" if sharing[name] > 1 else "") if name in measured else "not measured"
        lines.append(_step_row(name, shape or "-", *numbers, took))
    lines.append(_step_row("all", "-", *totals, f"{1e6 * sum(measured.values()):.0f}" if measured else "not measured"))
    return "\n".join(lines)


def _step_row(name: str, shape: str, count: float, nbytes: float, floor_s: float, estimated_s: float, took: str) -> str:
    return f"| {name} | {shape} | {count:.0f} | {nbytes / 1e6:,.2f} | {1e6 * floor_s:,.1f} | {1e6 * estimated_s:,.0f} | {took} |"


def batch_table(model: str, dtype: str, max_length: int, position: int, gpu: Gpu) -> str:
    """One pass of each size up to 32 requests of `position` earlier tokens each, the output head included, in Markdown.

    The estimate: for each launch one latency to start and one to end, and all bytes at the memory's bandwidth.
    """
    lines = [f"{model}, {dtype}, position {position}, {gpu.name}: {gpu.bytes_per_s / 1e12:.2f} TB/s.", ""]
    lines += ["| requests | our kernels | torch's | bytes to read (MB) | floor (us) | estimate (us) | of 1 request's |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    alone_s = 0.0
    for rows in (size for size in SIZES if size <= 32):
        launched = pass_launches(MODELS[model], dtype, max_length, rows)
        products = [each for each in launched if isinstance(each, Product)]
        nbytes = sum(each.nbytes if isinstance(each, Product) else each.bytes_to_read(position) for each in launched)
        floor_s = nbytes / gpu.bytes_per_s
        estimated_s = floor_s + len(launched) * (_LAUNCH_S + 2 * _LATENCY_S)
        alone_s = alone_s or estimated_s
        numbers = (
            f"{len(launched) - len(products)} | {len(products)} | {nbytes / 1e6:,.2f} | {1e6 * floor_s:,.0f} | {1e6 * estimated_s:,.0f}"
        )
        lines.append(f"| {rows} | {numbers} | {estimated_s / alone_s:.3f} |")
    return "\n".join(lines)


def estimate_s(launch: Launch, compiled: Compiled, position: int, gpu: Gpu) -> float:
    """Seconds of a launch: one latency to start and one to end, and its bytes at what the memory, or the loads in flight, allow.

    A product's loads in flight are those of its machine code; of another kernel all wide ones count.
    """
    nbytes = launch.bytes_to_read(position)
    registers = -(-compiled.registers // 8) * 8
    fitting = min(_REGISTERS_AN_SM // (registers * compiled.threads), _THREADS_AN_SM // compiled.threads, 32)
    at_once = min(launch.programs, fitting * gpu.sms)
    in_flight = at_once * compiled.threads * 16 * (compiled.loads_a_wait or max(compiled.wide_loads, 1))
    return _LAUNCH_S + 2 * _LATENCY_S + nbytes / min(gpu.bytes_per_s, in_flight / _LATENCY_S)


if __name__ == "__main__":
    sys.exit(main())
