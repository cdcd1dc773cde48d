"""What `make gpu-check` measures: its parts with their time limits, the rows of each with their bounds, and the table. Standard library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Row:
    """One line of the table. `bound` is what the project promises: value <= bound, or >= bound where `at_least`.

    `by_interval`: of a difference that should not be there, which is kept where the interval reaches the bound.
    """

    name: str
    what: str
    unit: str
    bound: float | None = None
    at_least: bool = False
    by_interval: bool = False


@dataclass(frozen=True)
class Part:
    """A process of its own. `limit_s` is its share of the budget; what earlier parts leave of theirs comes on top."""

    name: str
    limit_s: float
    rows: tuple[Row, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A row's value, or the reason why there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class PartResult:
    """How a part ended. `status` is 'ran', 'failed' or 'not run'; `reason` says why it is not 'ran'."""

    name: str
    status: str
    reason: str | None
    seconds: float | None
    limit_s: float | None
    log: str | None


# What matters first comes first: a machine that is taken away in the middle has answered it.
PARTS = (
    Part(
        "environment",
        20,
        (
            Row("copy_gb_per_s", "device-to-device copy, bytes read + written", "GB/s"),
            Row("pinned_up_gb_per_s", "pinned copy, host to device", "GB/s"),
            Row("pinned_down_gb_per_s", "pinned copy, device to host", "GB/s"),
        ),
    ),
    Part("model", 35, (Row("model_s", "GPT-J-6B shapes, fp16: random weights made, with their digest", "s", 40),)),
    Part(
        "local",
        55,
        (
            Row("setup_s", "local, set-up of the executor, without weights", "s", 5),
            Row("local_ms", "local, decode step (ITL)", "ms"),
            Row("local_over_floor", "local, decode step / (weight bytes / copy bandwidth)", "x", 1.35),
            Row("eager_ms", "local with executor eager, decode step", "ms"),
            Row("samplers_percent", "samplers' part of the ITL", "%", 1.0, by_interval=True),
        ),
        ("model",),
    ),
    Part(
        "wire",
        75,
        (
            Row("upload_gb_per_s", "weight upload, one loopback connection", "GB/s", 3, at_least=True),
            Row("by_hash_s", "second session of sys: offered by hash, until the worker is ready", "s"),
            Row("sys_over_local", "ITL sys / local, loopback", "x", 1.02),
            Row("remote_cache_over_local", "ITL remote_cache / local, loopback", "x"),
            Row("again_over_local", "ITL local / local (A/A)", "x"),
        ),
        ("model",),
    ),
    Part(
        "codecs",
        25,
        (
            Row("kv_ratio", "nvcomp_ans on KV, bf16: tensor bytes / payload bytes", "x", 1.35, at_least=True),
            Row("kv_ratio_fp16", "the same KV as fp16", "x"),
            Row("kv_encode_gb_per_s", "nvcomp_ans on KV, encode", "GB/s", 80, at_least=True),
            Row("kv_encode_prompt_gb_per_s", "nvcomp_ans, encode as much as GPT-J-6B keeps of 128 tokens", "GB/s"),
            Row("kv_decode_gb_per_s", "nvcomp_ans on KV, decode", "GB/s"),
            Row("kv_inexact_bytes", "nvcomp_ans on KV, bytes that came back different", "B", 0),
        ),
    ),
    Part(
        "recovery",
        40,
        (
            Row(
                "hidden_percent",
                "delta, 1/8 of the layers from a KV host, raw: part of the restore that compute hides",
                "%",
                50,
                at_least=True,
            ),
            Row("hidden_codec_percent", "the same with the KV codec of mode sys_delta", "%"),
            Row("miss_ms", "the same, raw: step that misses 1/8 - step that misses none", "ms"),
        ),
        ("model",),
    ),
    Part(
        "kernels",
        20,
        (
            Row("project_gb_per_s", "GPT-J's first product of a layer (28,672 x 4,096, fp16), weight bytes a second", "GB/s"),
            Row("merge_gb_per_s", "its last one (4,096 x 20,480), weight bytes a second", "GB/s"),
            Row("project_over_copy", "the first product's weight bytes a second / copy bandwidth", "x", 0.8, at_least=True),
            Row("merge_over_copy", "the last product's weight bytes a second / copy bandwidth", "x", 0.8, at_least=True),
            Row("kernels_ms", "local, decode step: time that the GPU spends in kernels", "ms"),
        ),
        ("model",),
    ),
    Part(
        "batch",
        20,
        (
            Row("batch_setup_s", "GPT-J-6B shapes: KV blocks of 16 requests, and the graphs of batches over them", "s"),
            Row("batch_1_ms", "step of 1 request, its token drawn", "ms"),
            Row("batch_16_ms", "step of 16 requests, their tokens drawn", "ms"),
            Row("batch_16_over_1", "step of 16 requests / of 1", "x", 1.25),
            Row("batch_shared_over_own", "step of 16 requests that share their prompt's blocks / of 16 that do not", "x"),
        ),
    ),
    Part(
        "llama",
        30,
        (
            Row("llama_setup_s", "Llama-3-8B shapes, set-up of the executor, without weights", "s", 5),
            Row("llama_ms", "Llama-3-8B shapes, decode step", "ms"),
            Row("llama_over_floor", "Llama-3-8B shapes, decode step / (weight bytes / copy bandwidth)", "x", 1.35),
        ),
    ),
    Part("tests", 105, (Row("tests_failed", "GPU tests that failed", "tests", 0),)),
    Part(
        "trial",
        35,
        (
            Row("trial_ms", "one trial of sys as the workflow runs it, ITL", "ms"),
            Row("trial_s", "one trial of sys as the workflow runs it, whole", "s"),
        ),
        ("model",),
    ),
    Part(
        "workflow",
        100,
        (
            Row("workflow_s", "config/gpu.yaml by Snakemake: 10 trials of a random model, with figures", "s"),
            Row("workflow_gpu_samples", "rows of NVML in its trials' Parquet files", "rows", 1, at_least=True),
            Row("workflow_gpm_samples", "those with GPM", "rows"),
            Row("workflow_dmon_samples", "rows of nvidia-smi dmon there", "rows", 1, at_least=True),
            Row("workflow_gpu_panels", "panels of the GPU in its telemetry figure", "panels", 1, at_least=True),
        ),
    ),
)


def without_bounds(part: Part) -> Part:
    """The part as it is rehearsed: nothing that a CPU measures keeps or misses a bound."""
    return replace(part, rows=tuple(replace(row, bound=None) for row in part.rows))


class Records:
    """What a part process leaves as it goes, one JSON object a line: so that what it measured outlives its crash."""

    def __init__(self, file: TextIO, part: Part) -> None:
        self._file, self._known = file, {row.name for row in part.rows}
        self.given: set[str] = set()

    def row(self, name: str, measured: Measured) -> None:
        """Gives a row of the part. KeyError for a row that the part does not have."""
        if name not in self._known:
            raise KeyError(f"row {name!r} is not one of {sorted(self._known)}")
        self.given.add(name)
        self._write({"row": name, **asdict(measured)})

    def fact(self, name: str, value: Any) -> None:
        """Gives something else that is worth keeping, as JSON."""
        self._write({"fact": name, "value": value})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def read_records(path: Path) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Rows and facts that a part left; a last line that a crash cut off is left out."""
    rows: dict[str, Measured] = {}
    facts: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if "row" in record:
            name = record.pop("row")
            rows[name] = Measured(**record)
        else:
            facts[record["fact"]] = record["value"]
    return rows, facts


def kept(row: Row, measured: Measured) -> bool | None:
    """Whether the value keeps the bound; None where there is no bound or no value."""
    if row.bound is None or measured.value is None:
        return None
    if row.by_interval:
        return measured.low is not None and measured.low <= row.bound
    return measured.value >= row.bound if row.at_least else measured.value <= row.bound


def missing_rows(part: Part, given: Mapping[str, Measured], reason: str) -> dict[str, Measured]:
    """All rows of a part in their order; those that it did not give have the reason."""
    return {row.name: given.get(row.name, Measured(reason=reason)) for row in part.rows}


def render_table(parts: Iterable[Part], measured: Mapping[str, Measured], results: Sequence[PartResult]) -> str:
    """The rows as a Markdown table, and below it the parts that did not run, or not to their end."""
    lines = ["| part | measured | value | bound | kept |", "| --- | --- | --- | --- | --- |"]
    for part in parts:
        for row in part.rows:
            found = measured[row.name]
            lines.append(f"| {part.name} | {row.what} | {_value(row, found)} | {_bound(row)} | {_kept(row, found)} |")
    lines += [f"\nPart {each.name} {each.status}: {each.reason}" for each in results if each.reason]
    return "\n".join(lines)


def _value(row: Row, measured: Measured) -> str:
    if measured.value is None:
        return f"not measured: {_in_cell(measured.reason or 'no reason was given')}"
    interval = "" if measured.low is None or measured.high is None else f" [{_digits(measured.low)}, {_digits(measured.high)}]"
    note = f"; {_in_cell(measured.note)}" if measured.note else ""
    return f"{_digits(measured.value)} {row.unit}{interval}{note}"


def _bound(row: Row) -> str:
    return "-" if row.bound is None else f"{'>=' if row.at_least else '<='} {row.bound:g} {row.unit}"


def _kept(row: Row, measured: Measured) -> str:
    return {True: "yes", False: "NO", None: "-"}[kept(row, measured)]


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _in_cell(text: str) -> str:
    """One line without what would end a Markdown cell."""
    return " ".join(text.split()).replace("|", "\\|")
