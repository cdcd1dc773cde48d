"""Writes trial directories with known numbers, in the schemas of a real trial."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from semgap.analysis.load import Trials, load_trials
from semgap.analysis.marks import marks_of
from semgap.analysis.results import EXACTNESS_COLUMNS, Results
from semgap.experiment.trial_schemas import (
    BATCHES,
    CONTROL,
    LEDGER,
    LOAD,
    MANIFEST_SCHEMA,
    RELAY,
    REQUESTS,
    STEPS,
    TCP,
    TrialResult,
    sealed_manifest,
)
from semgap.telemetry import dmon, host, nvml
from semgap.telemetry.samples import Column

RAW = {"tokens": "raw", "weights": "raw", "kv": "raw", "reply": "raw"}
SHRUNK = dict.fromkeys(RAW, "fp16_zlib")
CLAIMS = {"against": "remote_cache", "fewer_bytes": 0.3, "lower_latency": 0.15, "cast": "remote_cache_fp16"}
ROWS: dict[str, dict[str, Any]] = {
    "local": {},
    "remote_cache": {"rung": {"adds": "the cache stays with the worker"}, "blind": True},
    "remote_cache_again": {"twin": "remote_cache"},
    "remote_cache_planted": {"twin": "remote_cache", "plant_us": 1000},
    "sys_simulated": {"reference": "fp16 and zlib", "claims": CLAIMS},
    "remote_cache_zstd": {"reference": "knows nothing: zstd on everything", "blind": True},
    "know_position": {"rung": {"after": "remote_cache", "adds": "only the last position is read", "fact": "position"}},
    "know_layout": {"rung": {"after": "know_position", "adds": "floats have exponents", "fact": "layout"}},
    "know_head": {"rung": {"after": "know_layout", "adds": "logits are a linear map", "fact": "head", "needs": ["position"]}},
    "know_consumer": {"rung": {"after": "know_head", "adds": "the client only samples", "fact": "consumer", "needs": ["position"]}},
    "know_loop": {"rung": {"after": "know_consumer", "adds": "decoding is a loop", "fact": "loop", "needs": ["consumer"]}},
    "sys": {"rung": {"after": "know_loop", "adds": "all of it"}, "claims": CLAIMS},
}
"""Marks of modes, as in rows of define.modes."""
REPLY_OF = {"know_position": "logits_last", "know_layout": "logits_last", "know_head": "hidden_last"} | dict.fromkeys(
    ("know_consumer", "know_loop", "sys"), "token"
)
SAMPLER_COST = {"samples": 100, "span_s": 10.0, "cpu_s": 0.05, "busy_s": 0.1} | {
    "cpu_s_per_sample": 5e-4,
    "core_share": 0.005,
    "wall_share": 0.01,
}
PROBE = {"rtt_s": 5e-5, "goodput_up_bytes_per_s": 1.5e9, "goodput_down_bytes_per_s": 1.5e9, "payload_bytes": 16 << 20, "round_trips": 50}
NO_FLOOR = {"read_bytes_per_s": None, "step_bytes": None, "reason": "no floor in this test"}
NO_GPU = "no NVIDIA driver: Driver Not Loaded"
LEDGER_COUNTS, TCP_COUNTS = ([field.name for field in schema if field.type == pa.int64()][1:] for schema in (LEDGER, TCP))
UP_FRAME, DOWN_FRAME, SEGMENT_HEADER = 40, 30, 66
SETUP_BYTES, CLOSING_BYTES = 538_000_000, 4000
TTFT_S = 0.3  # the prefill before decode steps
REPLIES = ("logits", "hidden", "reply")  # classes that go down
LAYERS, LAYER_BYTES, MAX_LENGTH = 8, 1000, 256  # KV caches; LAYER_BYTES per layer and position


def sample_schema(columns: Iterable[Column]) -> pa.Schema:
    """The Parquet schema of a telemetry source."""
    return pa.schema([(column.name, pa.type_for_alias(column.kind)) for column in columns])


GPU = sample_schema(nvml.COLUMNS)


@dataclass(frozen=True)
class Pressed:
    """A measured step of a recovery phase: the fraction evicted before it (None: requests share memory), and how it came back.

    `fetched`: frame bytes from the KV host. If requests share memory, the step's whole cache was missing.
    """

    latency_s: float
    fraction: float | None = None
    how: str | None = None
    stall_s: float = 0.0
    alone_s: float | None = None
    predicted_s: float | None = None
    fetched: int = 0
    copied: int = 0
    fallback: str | None = None

    @property
    def layers(self) -> int:
        return LAYERS if self.fraction is None else round(self.fraction * LAYERS)

    def columns(self, position: int, local: bool) -> dict[str, Any]:
        evicted = {} if self.fraction is None else {"evict_fraction": self.fraction, "evicted_layers": self.layers}
        if local:
            return evicted
        saved = {"saved_tensor_bytes": 2000, "saved_payload_bytes": 1000} if self.fraction else {}
        times = {"restore_alone_s": self.alone_s, "stall_s": self.stall_s, "predicted_s": self.predicted_s}
        moved = {"fetched_network_bytes": self.fetched, "saved_network_bytes": 0, "copied_bytes": self.copied}
        missing = {"missing_bytes": self.layers * LAYER_BYTES * position}
        return evicted | saved | times | moved | missing | {"recovery": self.how, "recovery_planned": self.how, "fallback": self.fallback}


@dataclass(frozen=True)
class Prefilled:
    """A measured prefill of a prefix phase: how many tokens were known, and how they came."""

    latency_s: float
    prefix_tokens: int
    how: str | None = "recompute"
    stall_s: float = 0.0
    predicted_s: tuple[float | None, float | None] = (None, None)  # of fetching and of computing
    fetched: int = 0
    fallback: str | None = None

    def columns(self, local: bool) -> dict[str, Any]:
        known = {"prefix_tokens": self.prefix_tokens, "tokens_in": 576}
        if local:
            return known
        fetch_s, compute_s = self.predicted_s
        times = {"stall_s": self.stall_s, "predicted_fetch_s": fetch_s, "predicted_recompute_s": compute_s}
        moved = {"fetched_network_bytes": self.fetched, "saved_network_bytes": 0, "copied_bytes": 0}
        missing = {"missing_bytes": LAYERS * LAYER_BYTES * self.prefix_tokens if self.fetched else 0}
        return known | times | moved | missing | {"recovery": self.how, "recovery_planned": self.how, "fallback": self.fallback}


@dataclass(frozen=True)
class Trial:
    """The contents of one trial directory. `sizes`: payload bytes per step by tensor class."""

    mode: str
    phase: str = "decode"
    trial: int = 1
    latency_s: tuple[float, ...] = (0.06, 0.06, 0.06, 0.06)
    sizes: dict[str, int] = field(default_factory=lambda: {"tokens": 8, "logits": 196_608})
    session: str = "s1"
    fingerprint: str = "f1"
    codec: dict[str, str] = field(default_factory=lambda: dict(RAW))
    keeps: str = "bitwise"
    promise_kept: bool | None = True
    logits_bitwise: bool | None = True
    max_abs_diff: float | None = 0.0
    delta_bytes: int = 0  # up, in the first measured step
    kv_host_bytes: int = 0  # from the worker to its KV host
    gpu_percent: tuple[float, ...] = ()
    gpu_s: float | None = None  # of every step, by CUDA events
    host_hz: float = 10.0
    model: str = "smollm2"
    network: str = "loopback"
    uploads: tuple[int, ...] = (538_000_000,)
    held: tuple[int, ...] = (0,)
    held_before: bool = False  # the trial made the worker hold them
    source: str = "pypi"  # of the model
    pressed: tuple[Pressed, ...] = ()  # one for each of `latency_s`, in recovery phases
    prefilled: tuple[Prefilled, ...] = ()  # one for each of `latency_s`, in prefix phases
    prefix: str = "recompute"
    recovery: str = "reload"
    shadow: str = "kvhost"
    kv_budget: float = 1
    live_requests: int = 1
    probe: Mapping[str, Any] = field(default_factory=lambda: dict(PROBE))
    network_spec: Mapping[str, Any] = field(default_factory=lambda: {"kind": "loopback"})
    kv_probe: Mapping[str, Any] | None = None  # of the link that network_spec's kv names
    kv_network_spec: Mapping[str, Any] | None = None
    prefill: Mapping[str, Any] | None = None  # columns of a prefill before measured decode steps; None: no such row
    ahead: bool = False
    rows: tuple[Mapping[str, Any], ...] = ()  # columns of the measured steps, instead of `sizes`
    tensor_sizes: Mapping[str, int] | None = None  # bytes per step before the codec; None: twice `sizes`
    framing: int = UP_FRAME + DOWN_FRAME
    compute_s: float | None = 0.05  # of the worker, per step
    client_compute_s: float = 0.0
    codec_s: tuple[float, float] = (0.0, 0.0)  # of client and worker
    floor: Mapping[str, Any] = field(default_factory=lambda: NO_FLOOR)
    control_s: tuple[tuple[float, ...], ...] | None = None  # compute of each control step, by window; the steps from 1 on
    max_steps: int | None = None
    steal_share: float | None = None
    kind: str | None = None  # of the phase, if not that of its name or of `pressed`

    @property
    def local(self) -> bool:
        return self.mode == "local"

    @property
    def cell(self) -> dict[str, Any]:
        policy = {
            "placement": "local" if self.local else "remote",
            "weights": "every_step" if self.mode == "naive" else "once",
            "kv_cache": "offloaded" if self.mode.startswith("sys") else "resident",
            "reply": {"kind": REPLY_OF.get(self.mode, "logits_all")},
            "window": 32 if self.mode in ("know_loop", "sys") else 1,
            "max_steps": self.max_steps,
            "codec": self.codec,
            "keeps": self.keeps,
            "recovery": self.recovery,
            "prefix": self.prefix,
            "shadow": self.shadow,
            "ahead": self.ahead,
        }
        plain = "prefix" if self.prefilled else "recovery" if self.pressed else "prefill" if self.phase == "prefill" else "decode"
        kind = self.kind or plain
        fractions = sorted({step.fraction for step in self.pressed if step.fraction is not None})
        phase = {"kind": kind, "steps": 32 if self.max_steps else len(self.latency_s), "evict_fractions": fractions}
        phase |= {"prefix_lengths": sorted({each.prefix_tokens for each in self.prefilled})}
        phase |= {"kv_budget": self.kv_budget, "live_requests": self.live_requests}
        names = {name: getattr(self, name) for name in ("model", "network", "mode", "phase", "trial")}
        specs = {"model_spec": {"source": self.source}, "policy": policy, "phase_spec": phase, "network_spec": dict(self.network_spec)}
        specs |= {"kv_network_spec": dict(self.kv_network_spec)} if self.kv_network_spec else {}
        return names | specs | {"max_length": MAX_LENGTH}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.cell, sort_keys=True).encode()).hexdigest()


def write_trial(root: Path, trial: Trial) -> Path:
    """Writes a trial directory under `root`. Returns its path."""
    names = ("model", "network", "mode", "phase", "trial")
    directory = root.joinpath(*(f"{name}={getattr(trial, name)}" for name in names))
    directory.mkdir(parents=True)
    ledger = _ledger_rows(trial)
    TrialResult(_tables(trial, ledger), _manifest(trial, ledger)).write_into(directory)
    return directory


def _tables(trial: Trial, ledger: list[dict[str, Any]]) -> dict[str, pa.Table]:
    gpu = [{"t_s": 100.0 + i * 1e-3, "gpu_percent": used, "power_w": 300.0} for i, used in enumerate(trial.gpu_percent)]
    return {
        "requests": table(_request_rows(trial), REQUESTS),
        "steps": table(step_rows(trial), STEPS),
        "ledger": table(ledger, LEDGER),
        "tcp": table(_tcp_rows(ledger), TCP),
        "host": table(_host_rows(trial), sample_schema(host.COLUMNS)),
        "gpu": table(gpu, GPU),
        "relay": table([], RELAY),
        "dmon": table([], sample_schema(dmon.table_columns())),
        "control": table(_control_rows(trial), CONTROL),
        "load": table([], LOAD),
        "batches": table([], BATCHES),
    }


def reseal(directory: Path, **changes: Any) -> None:
    """Changes keys of a trial's manifest, and seals it and the tables as they now are: it looks as if it had been measured so."""
    file = directory / "manifest.json"
    file.write_bytes(sealed_manifest(json.loads(file.read_bytes()) | changes, directory))


def _manifest(trial: Trial, ledger: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": MANIFEST_SCHEMA,
        "cell": trial.cell,
        "cell_digest": trial.digest,
        "model": {
            "ratios_reason": "the weights are random numbers" if trial.cell["model_spec"]["source"] == "random" else None,
            "layers": LAYERS,
            "layers_share": 0.8,
        },
        "session": trial.session,
        "device": "cuda" if trial.gpu_s else "cpu",
        "fingerprint": trial.fingerprint,
        "provenance": {"utc": "2026-11-23T10:00:00+00:00", "machine": {"cpus": 2, "cpu": "a CPU"}, "git": {"commit": "c0ffee" * 7}},
        "floor": trial.floor,
        "control": {"rows": len(_control_rows(trial)), "reason": None if trial.control_s else "no control in this test"},
        "probe": None if trial.local else dict(trial.probe),
        "network": None if trial.local else {"kv": trial.kv_probe and {"probe": dict(trial.kv_probe)}},
        "setup": {
            "worker_start_s": 2.5,
            "weights_upload_s": 0.4,
            "weights_put_s": 0.2,
            "weights_bytes": trial.uploads[-1],
            "weights_held_bytes": trial.held[-1],
            "weights_held_before": trial.held_before,
            "weights_held_bytes_by_session": list(trial.held),
            "weights_bytes_by_session": list(trial.uploads),
        },
        "kv": {
            "budget_bytes": None if trial.local else int(trial.kv_budget * _caches(trial) * MAX_LENGTH * LAYERS * LAYER_BYTES),
            "fallbacks": [],
        },
        "memory": {"client_peak_rss_anon_bytes": 150_000_000} | ({"worker_weight_store_bytes": sum(trial.held)} if any(trial.held) else {}),
        "reconciliation": None if trial.local else _reconciliation(trial, ledger),
        "exactness": {
            "keeps": trial.keeps,
            "tokens_compared": len(trial.latency_s),
            "tokens_equal": len(trial.latency_s),
            "edge_draws": 0,
            "logits_bitwise": trial.logits_bitwise,
            "max_abs_diff": trial.max_abs_diff,
            "max_kl_nats": 0.0,
            "promise_kept": trial.promise_kept,
        },
        "load": None,
        "apart": None,
        "steal_share": trial.steal_share,
        "measured": {"start_s": 100.0, "end_s": 100.0 + sum(trial.latency_s)},
        "telemetry": {
            "gpu": {"rows": len(trial.gpu_percent), "reason": None if trial.gpu_percent else NO_GPU, "cost": {"client": None}},
            "host": {"rows": 1, "reason": None, "cost": {"client": SAMPLER_COST}},
            "dmon": {"rows": 0, "reason": NO_GPU, "cost": {"client": None}},
        },
    }


def _caches(trial: Trial) -> int:
    return trial.live_requests + (trial.control_s is not None)


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes a table of a trial anew, and seals the trial. KeyError for a column that is not in the schema."""
    pq.write_table(table(rows, schema), path)
    reseal(path.parent)


def table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The table of `rows`. KeyError for a column that is not in the schema."""
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise KeyError(f"there are no columns {sorted(unknown)}")
    return pa.Table.from_pylist(rows, schema=schema)


def _request_rows(trial: Trial) -> list[dict[str, Any]]:
    total = sum(trial.latency_s)
    prefill = trial.phase == "prefill"
    request = {
        "request": 1,
        "warmup": False,
        "prompt_tokens": 128,
        "new_tokens": 1 if prefill else len(trial.latency_s),
        "ttft_s": trial.latency_s[0] if prefill else TTFT_S,
        "e2e_s": total,
        "tpot_s": None if prefill or not trial.latency_s else total / len(trial.latency_s),
    }
    return [request | {"request": 0, "warmup": True, "ttft_s": 99.0, "tpot_s": 99.0}, request]


def step_rows(trial: Trial) -> list[dict[str, Any]]:
    """Rows of steps.parquet: an unmeasured step, then one for each latency."""
    latencies = [(99.0, False), *((value, True) for value in trial.latency_s)]
    tensors = {name: 2 * size for name, size in trial.sizes.items()} if trial.tensor_sizes is None else trial.tensor_sizes
    up, up_tensor, down, down_tensor = (
        0 if trial.local else sum(size for name, size in sizes.items() if (name in REPLIES) == is_reply)
        for is_reply in (False, True)
        for sizes in (trial.sizes, tensors)
    )
    rows = [
        {
            "request": int(measured),
            "step": step,
            "position": 128 + step,
            "tokens_in": 1,
            "token": step,
            "reference_token": step,
            "warmup": not measured,
            "measured": measured,
            "token_match": True,
            "edge_draw": False,
            "logits_bitwise": trial.logits_bitwise is True,
            "kind": "prefill" if trial.phase == "prefill" else "decode",
            "begin_s": 1.0 if not measured else 100.0 + sum(trial.latency_s[: step - 1]),
            "latency_s": latency_s,
            "client_cpu_s": 0.002,
            "worker_compute_s": trial.compute_s,
            "client_compute_s": trial.client_compute_s,
            "client_codec_s": None if trial.local else trial.codec_s[0],
            "worker_codec_s": None if trial.local else trial.codec_s[1],
            "worker_cpu_s": None if trial.local else 0.055,
            "gpu_s": trial.gpu_s,
            "up_tensor_bytes": up_tensor,
            "down_tensor_bytes": down_tensor,
            "up_payload_bytes": up,
            "down_payload_bytes": down,
            "up_frame_bytes": 0 if trial.local else up + trial.framing - DOWN_FRAME + (trial.delta_bytes if step == 1 else 0),
            "down_frame_bytes": 0 if trial.local else down + DOWN_FRAME,
            "up_segments": 0 if trial.local else 2,
            "down_segments": 0 if trial.local else 8,
            "round_trips": 0 if trial.local else 1,
            "logits_max_abs_diff": trial.max_abs_diff,
            "kl_nats": 0.0,
        }
        | (trial.pressed[step - 1].columns(128 + step, trial.local) if measured and trial.pressed else {})
        | (trial.prefilled[step - 1].columns(trial.local) if measured and trial.prefilled else {})
        | (trial.rows[step - 1] if measured and trial.rows else {})
        for step, (latency_s, measured) in enumerate(latencies)
    ]
    before = {"request": 1, "step": 0, "warmup": False, "measured": False, "kind": "prefill"}
    return [*rows, rows[0] | before | trial.prefill] if trial.prefill else rows


def _ledger_rows(trial: Trial) -> list[dict[str, Any]]:
    """Both ends of the client's link, which count the measured steps and the setup, those of the KV host's, and the PCIe link's."""
    if trial.local:
        return []
    steps = [row for row in step_rows(trial) if row["measured"]]
    sizes = {name: size * len(steps) for name, size in trial.sizes.items()}
    crossed: list[tuple[str, str, str, int, int]] = [("up", "setup", "weights", SETUP_BYTES, 0), ("up", "setup", "header", 0, 1000)]
    for way in ("up", "down"):
        own = {name: size for name, size in sizes.items() if (name in REPLIES) == (way == "down")}
        framing = sum(row[f"{way}_frame_bytes"] for row in steps) - sum(own.values()) - (trial.delta_bytes if way == "up" else 0)
        crossed += [(way, "regular", name, size, 0) for name, size in own.items()] + [(way, "regular", "header", 0, framing)]
    crossed += [("up", "delta", "kv", trial.delta_bytes, 0)] if trial.delta_bytes else []
    links = {("client", "network"): crossed, ("worker", "network"): crossed, ("worker", "pcie"): crossed}
    if trial.kv_host_bytes:
        links |= {(side, "network"): [("up", "delta", "kv", trial.kv_host_bytes, 0)] for side in ("worker_to_kv_host", "kv_host")}
    return [
        dict(zip(LEDGER.names[:7], (0, side, link, way, "forward", kind, name), strict=True))
        | dict.fromkeys(LEDGER_COUNTS, 0)
        | {"payload_bytes": payload, "header_bytes": header}
        for (side, link), rows in links.items()
        for way, kind, name, payload, header in rows
    ]


def _crossed(ledger: list[dict[str, Any]], **at: str) -> int:
    """The frame bytes of the client's ledger whose rows have these values."""
    rows = [row for row in ledger if row["side"] == "client" and all(row[key] == value for key, value in at.items())]
    return sum(row["payload_bytes"] + row["header_bytes"] for row in rows)


def _tcp_rows(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels' counters, which agree with the ledger: the closing answer reaches the client's kernel alone."""
    if not ledger:
        return []
    up, down = (_crossed(ledger, direction=way) for way in ("up", "down"))
    moved = {
        "client": {"bytes_sent": up + 1, "bytes_received": down + CLOSING_BYTES},
        "worker": {"bytes_sent": down + 1, "bytes_received": up},
    }
    counts = dict.fromkeys(TCP_COUNTS, 1) | {"segment_header_bytes": SEGMENT_HEADER, "congestion": "cubic"}
    begin = [{"connection": 0, "side": "client", "moment": "start"} | counts]
    return begin + [{"connection": 0, "side": side, "moment": "end"} | counts | own for side, own in moved.items()]


def _reconciliation(trial: Trial, ledger: list[dict[str, Any]]) -> dict[str, Any]:
    up, down = (_crossed(ledger, direction=way) for way in ("up", "down"))
    host = {"agreed": True, "frame_bytes_by_kind": {"delta": trial.kv_host_bytes}}
    host |= {"kernel_bytes_sent": trial.kv_host_bytes, "kernel_bytes_received": CLOSING_BYTES}
    return {
        "agreed": True,
        "connections": 1,
        "frame_bytes_by_kind": {kind: _crossed(ledger, kind=kind) for kind in ("setup", "regular", "delta")},
        "closing_frame_bytes": CLOSING_BYTES,
        "kernel_bytes_sent": up,
        "kernel_bytes_received": down + CLOSING_BYTES,
        "retransmitted_bytes": 2,
        "kv_host": host if trial.kv_host_bytes else None,
    }


def _host_rows(trial: Trial) -> list[dict[str, Any]]:
    end_s = sum(trial.latency_s) + 0.5
    count = int((end_s + 3) * trial.host_hz)
    rows = []
    for index in range(count):
        t_s = 97.0 + index / trial.host_hz
        inside = 100 <= t_s <= 100 + sum(trial.latency_s)
        for side, busy, rss in (("client", 12.0, 160e6), ("worker", 97.0, 900e6)):
            if trial.local and side == "worker":
                continue
            cpu = (97.0 if trial.local else busy) if inside else 20 + 15 * (index % 5)
            rows.append({"t_s": t_s, "side": side, "pid": 1, "cpu_percent": cpu, "rss_bytes": int(rss)})
    return rows


def _control_rows(trial: Trial) -> list[dict[str, Any]]:
    rows, step = [], 0
    for window, spent in enumerate(trial.control_s or ()):
        for compute_s in spent:
            step += 1
            rows.append({"request": 1, "step": step, "position": 128 + step, "window": window, "begin_s": 1.0, "compute_s": compute_s})
    return rows


_LOADED: dict[str, Trials] = {}
_COMPUTED: dict[int, Results] = {}


def load(root: Path, *trials: Trial) -> Trials:
    """The loaded trials. Equal ones are written, under the first `root`, and loaded once in a process."""
    key = repr(trials)
    if key not in _LOADED:
        _LOADED[key] = written(root, *trials)
    return _LOADED[key]


def written(root: Path, *trials: Trial) -> Trials:
    """Writes the trials under `root` and loads them."""
    directories = [write_trial(root, trial) for trial in trials]
    expected = {str(d): trial.digest for d, trial in zip(directories, trials, strict=True)}
    return load_trials(directories, expected)


def pressed(mode: str, *trials: tuple[Pressed, ...], phase: str = "recovery-evict", **fields: Any) -> list[Trial]:
    """Trials of a recovery phase with these steps, numbered from 1."""
    return [
        Trial(mode, phase, number, tuple(step.latency_s for step in steps), pressed=steps, **fields)
        for number, steps in enumerate(trials, 1)
    ]


def prefilled(mode: str, *trials: tuple[Prefilled, ...], **fields: Any) -> list[Trial]:
    """Trials of a prefix phase with these prefills, numbered from 1."""
    return [
        Trial(mode, "prefix", number, tuple(each.latency_s for each in prefills), prefilled=prefills, **fields)
        for number, prefills in enumerate(trials, 1)
    ]


def repeated(mode: str, latencies_ms: tuple[float, ...], **fields: Any) -> list[Trial]:
    """One trial for each latency, numbered from 1."""
    return [Trial(mode, trial=number, latency_s=(value / 1e3,) * 4, **fields) for number, value in enumerate(latencies_ms, 1)]


def results_of(trials: Trials, exactness: pd.DataFrame | None = None, codecs: pd.DataFrame | None = None) -> Results:
    """Results of the trials, computed once in a process, and of exactness and codecs if given."""
    if id(trials) not in _COMPUTED:  # holds the trials too, so that their id stays theirs
        unchecked = pd.DataFrame(columns=list(EXACTNESS_COLUMNS))
        _COMPUTED[id(trials)] = Results.of(trials, unchecked, pd.DataFrame(), marks_of(ROWS))
    given = {name: frame for name, frame in (("exactness", exactness), ("codecs", codecs)) if frame is not None}
    return replace(_COMPUTED[id(trials)], **given) if given else _COMPUTED[id(trials)]


def results(root: Path, *trials: Trial) -> Results:
    """Results of trials that are written under `root`."""
    return results_of(load(root, *trials))
