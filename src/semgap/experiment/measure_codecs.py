"""Codecs on tensors of the real model: ratio, speed, exactness, and the effect of their losses on the logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from semgap import codecs
from semgap.codecs import CODECS, Codec, CodecError, Encoded
from semgap.codecs.arrays import from_wire, to_wire
from semgap.engine.executor import Executor
from semgap.engine.model_files import ModelDigest
from semgap.experiment.cell import Cell
from semgap.experiment.dump_tensors import GROUPS, Dump, load_executor
from semgap.experiment.exactness import kl_nats
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_setup import Paths, check_model
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring
from semgap.tensors import Tensor, TensorClass

if TYPE_CHECKING:
    from semgap.codecs.base import Payloads

Made = TypeVar("Made")
T = TypeVar("T")
Coded = TypeVar("Coded", "Encoded", "Payloads")
BASELINE = "fp16_zlib"
DIGEST_KEY = b"semgap.cell_digest"
CAST_TO = (torch.float16, torch.bfloat16)
HALF_BYTES = 2
_CPU = "cpu"
_BUDGET_S, _LONG_BUDGETS, _FEWEST_RUNS, _MOST_RUNS = 0.1, 3, 3, 15
_CALL_NS, _FASTEST_BYTES_PER_NS = 5_000, 50  # passing memory on takes less than a call and a read at 50 GB/s

TABLE = pa.schema(
    [(name, pa.string()) for name in ("model", "tensor", "tensor_class", "dtype")]
    + [("run_dtype", pa.bool_())]
    + [(name, pa.string()) for name in ("shape", "codec", "device")]
    + [(name, pa.int64()) for name in ("tensors", "raw_bytes", "payload_bytes")]
    + [(name, pa.float64()) for name in ("ratio", "ratio_to_fp16", "ratio_to_fp16_zlib", "entropy_bits_per_element", "entropy_ratio")]
    + [(name, pa.float64()) for name in ("encode_mb_per_s", "decode_mb_per_s")]
    + [("speed_reason", pa.string()), ("encode_runs", pa.int64()), ("decode_runs", pa.int64()), ("exact", pa.bool_())]
    + [("kl_nats", pa.float64()), ("max_abs_diff", pa.float64()), ("rows_compared", pa.int64()), ("kl_reason", pa.string())]
    + [("ratio_meaningful", pa.bool_()), ("ratio_reason", pa.string()), ("reason", pa.string())]
)


@dataclass(frozen=True)
class Effect:
    """The effect of a decoded tensor on logits, against the untouched one: mean KL (nats) and largest difference over `rows` of them."""

    kl_nats: float | None
    max_abs_diff: float | None
    rows: int | None
    reason: str | None = None


@dataclass(frozen=True)
class Timed:
    """A codec over a group of tensors: the decoded tensors, and nanoseconds of the median run each way.

    Times are None if the codec only passes memory on: such a time does not depend on the size.
    """

    decoded: tuple[Tensor, ...]
    payload_bytes: int
    encode_ns: float | None
    decode_ns: float | None
    encode_runs: int
    decode_runs: int


def measure_codecs(raw: Mapping[str, Any], paths: Paths, tensors_file: Path, output: Path) -> None:
    """Writes one row for each tensor of the dump, dtype (the run's, float16, bfloat16) and codec that accepts it, as Parquet.

    Speeds count the raw tensor's bytes, on one thread, median of the runs (`time_codec`). CodecError for a codec that is called
    exact and is not.
    """
    end_with_workflow()
    cell = Cell.of(raw)
    with measuring():
        digest = check_model(paths.model_directory, cell)
        executor = load_executor(cell, paths)
        dump = Dump.read(tensors_file)
        effects = Effects(executor, dump)
        rows = [row for name, group in dump.groups.items() for row in _group_rows(name, group, effects)]
    for row in rows:
        row |= {"model": cell.model, **_meaning(row["tensor_class"], digest)}
    table = pa.Table.from_pylist(rows, TABLE).replace_schema_metadata({DIGEST_KEY: content_digest(raw).encode()})
    output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, output)


def time_codec(tensors: Sequence[Tensor], codec: Codec, budget_s: float = _BUDGET_S) -> Timed:
    """Encodes `tensors`, then decodes them: each way a warm-up, 3 runs, and more while `budget_s` lasts, 15 at most.

    Long runs vary little: a way stops early after 3 budgets. If the warm-up alone takes that long, it is the only run and counts;
    else it does not, since fresh memory can make it many times slower than the others.
    """
    encode_ns, encoded, encode_runs = _repeat(lambda: _encode(codecs.encode, tensors, codec), budget_s)
    payloads = tuple(memoryview(b"".join(one.buffers)) for one in encoded)  # the socket's work, not timed
    decode_ns, decoded, decode_runs = _repeat(lambda: _decode(encoded, payloads, codec), budget_s)
    raw_bytes = sum(tensor.data.nbytes for tensor in tensors)
    same_in = all(one.buffers[:1] and one.buffers[0] is tensor.data for one, tensor in zip(encoded, tensors, strict=True))
    same_out = all(tensor.data is payload for tensor, payload in zip(decoded, payloads, strict=True))
    at_most_ns = len(tensors) * _CALL_NS + raw_bytes / _FASTEST_BYTES_PER_NS
    return Timed(
        decoded=decoded,
        payload_bytes=sum(payload.nbytes for payload in payloads),
        encode_ns=None if same_in and encode_ns < at_most_ns else encode_ns,
        decode_ns=None if same_out and decode_ns < at_most_ns else decode_ns,
        encode_runs=encode_runs,
        decode_runs=decode_runs,
    )


def time_on_device(tensors: Sequence[Tensor], codec: Codec, where: str, budget_s: float = _BUDGET_S) -> Timed:
    """As `time_codec`, for a codec that runs on the tensors' device. Counts the device's time, without copies over PCIe."""
    from semgap.codecs import device
    from semgap.codecs.clock import Clock

    there = [from_wire(tensor, where)[None] for tensor in tensors]
    encode_ns, made, encode_runs = _repeat(lambda: _encode(device.encode, there, codec), budget_s)
    joined = [bytes(one.heads[0]) + one.body.cpu().numpy().tobytes() for one in made]
    uploaded = [torch.frombuffer(bytearray(one), dtype=torch.uint8).to(where) for one in joined]

    def decode() -> tuple[int, tuple[torch.Tensor, ...]]:
        took_ns, decoded = 0, []
        for tensor, payload, host in zip(tensors, uploaded, joined, strict=True):
            clock = Clock(where)
            value, intact = device.decode(codec, payload, memoryview(host), tensor.dtype, tensor.shape)
            clock.stop()
            device.require(intact)
            took_ns += clock.took_ns()
            decoded.append(value)
        return took_ns, tuple(decoded)

    decode_ns, decoded, decode_runs = _repeat(decode, budget_s)
    back = tuple(to_wire(value, tensor.cls) for value, tensor in zip(decoded, tensors, strict=True))
    return Timed(back, sum(map(len, joined)), encode_ns, decode_ns, encode_runs, decode_runs)


def _repeat(run: Callable[[], tuple[int, Made]], budget_s: float) -> tuple[float, Made, int]:
    """The median time of the runs in ns, the result of the last one, and their number. `run` gives its own time and its result."""
    begin = time.perf_counter()
    took_ns, made = run()
    if time.perf_counter() - begin >= _LONG_BUDGETS * budget_s:
        return took_ns, made, 1
    runs_ns: list[int] = []
    while not runs_ns or _goes_on(len(runs_ns), time.perf_counter() - begin, budget_s):
        took_ns, made = run()
        runs_ns.append(took_ns)
    return median(runs_ns), made, len(runs_ns)


def _goes_on(runs: int, elapsed_s: float, budget_s: float) -> bool:
    return runs < _MOST_RUNS and elapsed_s < (_LONG_BUDGETS * budget_s if runs < _FEWEST_RUNS else budget_s)


def _encode(encode: Callable[[T, Codec], Coded], tensors: Sequence[T], codec: Codec) -> tuple[int, list[Coded]]:
    encoded = [encode(tensor, codec) for tensor in tensors]
    return sum(one.encode_ns for one in encoded), encoded


def _decode(encoded: Sequence[Encoded], payloads: Sequence[memoryview], codec: Codec) -> tuple[int, tuple[Tensor, ...]]:
    pairs = zip(encoded, payloads, strict=True)
    decoded = [codecs.decode(codec.code, one.cls, one.dtype, one.shape, payload) for one, payload in pairs]
    return sum(took_ns for _, took_ns in decoded), tuple(tensor for tensor, _ in decoded)


def measure_codec(name: str, tensors: Sequence[Tensor], codec: Codec, effects: Effects, where: str = _CPU) -> dict[str, Any]:
    """The columns of `TABLE` that depend on the codec, which runs on device `where`. CodecError if it is called exact and is not.

    If it refuses the tensor, or this machine lacks what it needs, the row holds the reason alone.
    """
    raw_bytes = sum(tensor.data.nbytes for tensor in tensors)
    row: dict[str, Any] = {"codec": codec.name, "device": "cuda" if codec.needs_gpu else where, "raw_bytes": raw_bytes}
    row |= {"payload_bytes": None, "reason": None}
    try:
        timed = time_codec(tensors, codec) if where == "cpu" else time_on_device(tensors, codec, where)
    except CodecError as error:
        return row | {"reason": str(error)}
    exact = all(ours.data == theirs.data for ours, theirs in zip(timed.decoded, tensors, strict=True))
    if codec.exact and not exact:
        raise CodecError(f"codec {codec.name!r} says it is exact, and {name} in {tensors[0].dtype.torch_name} comes back otherwise")
    is_float = tensors[0].dtype.is_float
    half_bytes = raw_bytes // tensors[0].dtype.itemsize * HALF_BYTES
    effect = effects.of(name, timed.decoded)
    speeds = [None if took_ns is None else raw_bytes / took_ns * 1e3 for took_ns in (timed.encode_ns, timed.decode_ns)]
    return row | {
        "payload_bytes": timed.payload_bytes,
        "ratio": raw_bytes / timed.payload_bytes,
        "ratio_to_fp16": half_bytes / timed.payload_bytes if is_float else None,
        "encode_mb_per_s": speeds[0],
        "decode_mb_per_s": speeds[1],
        "speed_reason": "memory is handed on as it lies" if None in speeds else None,
        "encode_runs": timed.encode_runs,
        "decode_runs": timed.decode_runs,
        "exact": exact,
        "kl_nats": effect.kl_nats,
        "max_abs_diff": effect.max_abs_diff,
        "rows_compared": effect.rows,
        "kl_reason": effect.reason,
    }


def entropy_bits(tensors: Sequence[Tensor]) -> float:
    """Order-0 entropy of the byte planes in bits per element: the sum over an element's bytes of the entropy of that byte's values.

    Each plane covers all `tensors` (of one dtype). This bounds coders that take each byte by itself, with a fixed table per plane; a
    coder with a context, or with changing tables, may do better. The tables' size is left out, so few elements make it too small.
    """
    itemsize = tensors[0].dtype.itemsize
    counts = np.zeros((itemsize, 256), dtype=np.int64)
    for tensor in tensors:
        planes = np.frombuffer(tensor.data, dtype=np.uint8).reshape(-1, itemsize)
        counts += np.stack([np.bincount(planes[:, plane], minlength=256) for plane in range(itemsize)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    return float(np.sum(shares * -np.log2(shares, out=np.zeros_like(shares), where=shares > 0)))


class Effects:
    """The effects of losses on logits. Decoded tensors of equal values have equal effects, so each effect is computed once."""

    def __init__(self, executor: Executor, dump: Dump) -> None:
        self._executor, self._dump = executor, dump
        self.device = executor.device
        self._known: dict[tuple[str, str], Effect] = {}
        self._reference: dict[str, np.ndarray] = {}

    def of(self, name: str, decoded: Sequence[Tensor]) -> Effect:
        """The effect of a decoded group of the dump; null with a reason if it has no effect on logits or no finite one."""
        cls = GROUPS[name]
        if cls is TensorClass.TOKENS:
            return Effect(None, None, None, "token ids: wrong unless exact")
        if cls is TensorClass.WEIGHTS:
            return Effect(None, None, None, "what lossy weights do to logits was not measured")
        values = decoded[0].as_float32()
        key = (name, xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values)))
        if key not in self._known:
            self._known[key] = self._compare(name, values)
        return self._known[key]

    def _compare(self, name: str, values: np.ndarray) -> Effect:
        if not np.isfinite(values).all():
            return Effect(None, None, None, "the codec or the cast made values that are not finite")
        if name not in self._reference:
            (untouched,) = self._dump.groups[name]
            self._reference[name] = self._logits(name, untouched.to(torch.float32).numpy())
        ours, theirs = self._logits(name, values), self._reference[name]
        kl = [kl_nats(reference, row) for reference, row in zip(theirs, ours, strict=True)]
        finite = [value for value in kl if value is not None]
        if len(finite) < len(kl):
            return Effect(None, None, None, "the logits that come of it are not finite")
        return Effect(float(np.mean(finite)), float(np.max(np.abs(theirs - ours))), len(kl))

    def _logits(self, name: str, values: np.ndarray) -> np.ndarray:
        """Logits (n, vocab), float32, computed from `values`: themselves, through the head, or of the text that follows a cache."""
        if GROUPS[name] is TensorClass.LOGITS:
            return values.reshape(-1, values.shape[-1])
        tensor = torch.tensor(values).to(self._executor.device, getattr(torch, self._executor.dtype.torch_name))
        if GROUPS[name] is TensorClass.HIDDEN:
            return self._executor.logits(tensor).to("cpu", torch.float32).numpy()
        cache = self._executor.new_cache()
        cache.load(cache.pool.unpack(to_wire(tensor, TensorClass.KV)))
        return self._executor.logits(self._executor.forward(self._dump.following, cache)).to("cpu", torch.float32).numpy()


def _group_rows(name: str, group: Sequence[torch.Tensor], effects: Effects) -> list[dict[str, Any]]:
    """The rows of one group, for all dtypes and codecs."""
    run_dtype = group[0].dtype
    dtypes = dict.fromkeys((run_dtype, *CAST_TO)) if run_dtype.is_floating_point else {run_dtype: None}
    rows = []
    for dtype in dtypes:
        tensors = [to_wire(tensor.to(dtype), GROUPS[name]) for tensor in group]
        accepted = [codec for codec in CODECS.values() if GROUPS[name] in codec.accepts]
        measured = [measure_codec(name, tensors, codec, effects, where) for codec in accepted for where in _places(codec, effects.device)]
        baseline = next((row["payload_bytes"] for row in measured if row["codec"] == BASELINE), None)
        shared = _shared(name, tensors) | {"run_dtype": dtype == run_dtype}
        rows += [shared | row | {"ratio_to_fp16_zlib": _over(baseline, row["payload_bytes"])} for row in measured]
    return rows


def _places(codec: Codec, device: str) -> list[str]:
    """The devices to measure a codec on: the CPU, the run's GPU if the codec can use it, or both."""
    if device == "cpu" or not codec.on_device or codec.unavailable():
        return [_CPU]
    return [device] if codec.needs_gpu else [_CPU, device]


def _shared(name: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The columns that all codecs of a group share."""
    dtype, bits = tensors[0].dtype, entropy_bits(tensors)
    return {
        "tensor": name,
        "tensor_class": GROUPS[name].name.lower(),
        "dtype": dtype.torch_name,
        "shape": "x".join(map(str, tensors[0].shape)) if len(tensors) == 1 else "several",
        "tensors": len(tensors),
        "entropy_bits_per_element": bits,
        "entropy_ratio": _over(8 * dtype.itemsize, bits),
    }


def _meaning(tensor_class: str, digest: ModelDigest) -> dict[str, Any]:
    """Are the ratios those of a trained model? Not on weights that the digest excludes, nor on tensors that random weights computed."""
    excluded = tensor_class == "weights" or (digest.source.get("source") == "random" and tensor_class != "tokens")
    meaningful = digest.ratios_meaningful or not excluded
    return {"ratio_meaningful": meaningful, "ratio_reason": None if meaningful else digest.ratios_reason}


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None
