"""Codecs on tensors of the real model: ratio, speed, exactness, and the effect of their losses on the logits."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from semgap.codecs import CODECS, Codec, CodecError
from semgap.codecs.arrays import to_wire
from semgap.engine.executor import Executor
from semgap.engine.model_files import ModelDigest
from semgap.experiment.cell import Cell
from semgap.experiment.dump_tensors import GROUPS, Dump, load_executor
from semgap.experiment.exactness import kl_nats
from semgap.experiment.measure_codecs_speeds import CPU, Sample, Speed, places, run_of
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_setup import Paths, check_model
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring
from semgap.processes.scratch import scratch_directory
from semgap.seal import BLANK, KEY, place_of, sealed, write_whole
from semgap.tensors import Tensor, TensorClass

BASELINE = "fp16_zlib"
DIGEST_KEY = b"semgap.cell_digest"
CAST_TO = (torch.float16, torch.bfloat16)
HALF_BYTES = 2
_PROCESSES, _SAMPLE_BYTES = 3, 1 << 19
SPEEDS = tuple(f"{memory}_{way}_mb_per_s" for memory in ("cold", "warm") for way in ("encode", "decode"))
"""The columns of speeds: a value for each process."""

TABLE = pa.schema(
    [(name, pa.string()) for name in ("model", "tensor", "tensor_class", "dtype")]
    + [("run_dtype", pa.bool_())]
    + [(name, pa.string()) for name in ("shape", "codec", "device")]
    + [(name, pa.int64()) for name in ("tensors", "raw_bytes", "payload_bytes")]
    + [(name, pa.float64()) for name in ("ratio", "ratio_to_fp16", "ratio_to_fp16_zlib", "entropy_bits_per_element", "entropy_ratio")]
    + [(name, pa.list_(pa.float64())) for name in SPEEDS]
    + [("speed_reason", pa.string()), ("exact", pa.bool_())]
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


def measure_codecs(raw: Mapping[str, Any], paths: Paths, tensors_file: Path, output: Path) -> None:
    """Writes one row for each tensor of the dump, dtype (the run's, float16, bfloat16) and codec that accepts it, as Parquet.

    Speeds are of raw bytes, on one thread, one value for each of the fresh processes that measure them in turn. CodecError for a codec
    that is called exact and is not.
    """
    end_with_workflow()
    cell = Cell.of(raw)
    with measuring():
        digest = check_model(paths.model_directory, cell)
        executor = load_executor(cell, paths)
        dump = Dump.read(tensors_file)
        effects = Effects(executor, dump)
        cast = [(name, tensors) for name, group in dump.groups.items() for tensors in _casts(name, group)]
        speeds = _measured_speeds([sample_of(name, tensors) for name, tensors in cast], executor.device)
        rows = [row for name, tensors in cast for row in _group_rows(name, tensors, effects)]
    for row in rows:
        row |= {"model": cell.model, "run_dtype": row["dtype"] in (cell.dtype, "int64"), **_meaning(row["tensor_class"], digest)}
        row |= _speed_columns(speeds.get((row["tensor"], row["dtype"], row["codec"], row["device"]), []))
    write_whole(output, sealed_codecs(pa.Table.from_pylist(rows, TABLE), content_digest(raw), place_of(output)))


def sealed_codecs(table: pa.Table, cell_digest: str, place: str = "") -> bytes:
    """The Parquet file of measured codecs at that place, with the digest of their cell in its metadata."""
    made = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({DIGEST_KEY: cell_digest, KEY: BLANK}), made, write_page_checksum=True)
    return sealed(made.getvalue(), place)


def measure_codec(name: str, tensors: Sequence[Tensor], codec: Codec, effects: Effects, where: str = CPU) -> dict[str, Any]:
    """The columns of `TABLE` that depend on the codec, which runs on device `where`. CodecError if it is called exact and is not.

    If it refuses the tensor, or this machine lacks what it needs, the row holds the reason alone.
    """
    raw_bytes = sum(tensor.data.nbytes for tensor in tensors)
    row: dict[str, Any] = {"codec": codec.name, "device": "cuda" if codec.needs_gpu else where, "raw_bytes": raw_bytes}
    row |= {"payload_bytes": None, "reason": None}
    try:
        run = run_of(tensors, codec, where)
        run.encode()
        run.join()
        run.decode()
    except CodecError as error:
        return row | {"reason": str(error)}
    decoded, payload_bytes = run.decoded, sum(payload.nbytes for payload in run.payloads)
    exact = all(ours.data == theirs.data for ours, theirs in zip(decoded, tensors, strict=True))
    if codec.exact and not exact:
        raise CodecError(f"codec {codec.name!r} says it is exact, and {name} in {tensors[0].dtype.torch_name} comes back otherwise")
    is_float = tensors[0].dtype.is_float
    half_bytes = raw_bytes // tensors[0].dtype.itemsize * HALF_BYTES
    effect = effects.of(name, decoded)
    return row | {
        "payload_bytes": payload_bytes,
        "ratio": raw_bytes / payload_bytes,
        "ratio_to_fp16": half_bytes / payload_bytes if is_float else None,
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


def sample_of(name: str, tensors: Sequence[Tensor]) -> Sample:
    """The first rows of the group's middle tensor, up to about 512 KiB.

    On SmolLM2 zstd's cold speeds were the same up to 25 MB; those of a mere cast were half as high there.
    """
    tensor = tensors[len(tensors) // 2]
    row_bytes = tensor.data.nbytes // tensor.shape[0]
    rows = min(tensor.shape[0], max(1, _SAMPLE_BYTES // row_bytes))
    return Sample(name, (replace(tensor, shape=(rows, *tensor.shape[1:]), data=tensor.data[: rows * row_bytes]),))


def _measured_speeds(samples: Sequence[Sample], device: str) -> dict[tuple[str, str, str, str], list[Speed]]:
    """The speeds by tensor, dtype, codec and device, each of all processes. They run in turn, on this process's cores."""
    found: dict[tuple[str, str, str, str], list[Speed]] = {}
    with scratch_directory("codecs") as scratch:
        given, made = scratch / "samples.msgpack", scratch / "speeds.json"
        given.write_bytes(msgspec.msgpack.encode((device, samples)))
        for _ in range(_PROCESSES):
            module = "semgap.experiment.measure_codecs_speeds"
            subprocess.run([sys.executable, "-m", module, str(os.getpid()), str(given), str(made)], check=True)
            for speed in msgspec.json.decode(made.read_bytes(), type=list[Speed]):
                found.setdefault((speed.group, speed.dtype, speed.codec, speed.device), []).append(speed)
    return found


def _speed_columns(speeds: Sequence[Speed]) -> dict[str, Any]:
    """`SPEEDS`, and why one of them is null."""
    if not speeds:
        return {"speed_reason": None}  # the codec refused: the row's reason says why
    by_way = [[getattr(speed, name.removesuffix("_mb_per_s")) for speed in speeds] for name in SPEEDS]
    values = [None if None in way else [1e3 * speed for speed in way] for way in by_way]
    return dict(zip(SPEEDS, values, strict=True)) | {"speed_reason": "memory is handed on as it lies" if None in values else None}


def _casts(name: str, group: Sequence[torch.Tensor]) -> list[list[Tensor]]:
    """A group in each of its dtypes: the run's, and for floats those of `CAST_TO`."""
    run_dtype = group[0].dtype
    dtypes = dict.fromkeys((run_dtype, *CAST_TO)) if run_dtype.is_floating_point else {run_dtype: None}
    return [[to_wire(tensor.to(dtype), GROUPS[name]) for tensor in group] for dtype in dtypes]


def _group_rows(name: str, tensors: Sequence[Tensor], effects: Effects) -> list[dict[str, Any]]:
    """The rows of one group in one dtype, for all codecs."""
    accepted = [codec for codec in CODECS.values() if GROUPS[name] in codec.accepts]
    measured = [measure_codec(name, tensors, codec, effects, where) for codec in accepted for where in places(codec, effects.device)]
    baseline = next((row["payload_bytes"] for row in measured if row["codec"] == BASELINE), None)
    shared = _shared(name, tensors)
    return [shared | row | {"ratio_to_fp16_zlib": _over(baseline, row["payload_bytes"])} for row in measured]


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
