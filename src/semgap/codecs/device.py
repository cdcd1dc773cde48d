"""Codecs computed where the tensors are: payloads that either side may decode, from and to tensors of a device.

Everything is enqueued on the current stream. `encode` waits for it once, to learn how long the payloads are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import torch

from semgap.codecs import ans, device_groups, nvcomp
from semgap.codecs.ans import CHUNK, NvcompAns
from semgap.codecs.base import Codec, CodecError
from semgap.codecs.groups import DAMAGED, OUT_OF_RANGE, Groups, check_shape
from semgap.tensors import DType, Tensor, bytes_view

_SHORTEST = 1024  # bytes; nvCOMP's tables alone take half of that


@dataclass(frozen=True)
class Payloads:
    """Payloads of tensors of one shape, still on the device: payload i is `heads[i]`, on the host, then body[bounds[i] : bounds[i + 1]].

    `body` is (n,) uint8. `encode_ns` is the device's own time on a GPU.
    """

    heads: list[memoryview]
    body: torch.Tensor
    bounds: list[int]
    encode_ns: int

    def part(self, index: int) -> torch.Tensor:
        """The body of one payload."""
        return self.body[self.bounds[index] : self.bounds[index + 1]]


def encode(tensors: torch.Tensor, codec: Codec) -> Payloads:
    """The payloads of b tensors of one shape, stacked [b, ...]. CodecError as the codec has it; it must be `on_device`, or raw."""
    dtype = DType.from_torch_name(str(tensors.dtype))
    tensors = tensors.contiguous()
    clock = Clock(tensors.device)
    if isinstance(codec, NvcompAns):
        return _encode_ans(tensors, dtype, clock)
    count, nothing = len(tensors), memoryview(b"")
    if isinstance(codec, Groups):
        check_shape(codec.name, dtype, tuple(tensors.shape[1:]))
        rows, fits = device_groups.encode(tensors, codec.bits)
        clock.stop()
        if not fits.item():
            raise CodecError(OUT_OF_RANGE)
        took_ns = clock.took_ns()
    else:
        rows, took_ns = tensors.view(torch.uint8).view(count, -1) if tensors.numel() else tensors.new_empty((count, 0)), 0
    return Payloads([nothing] * count, rows.flatten(), [rows.shape[1] * index for index in range(count + 1)], took_ns)


def decode(
    codec: Codec, payload: torch.Tensor, host: memoryview, dtype: DType, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `decode_all`, of one payload."""
    (value,), intact = decode_all(codec, [payload], [host], dtype, [shape])
    return value, intact


def decode_all(
    codec: Codec, payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The tensors of payloads (n,) uint8 on one device, of which `hosts` hold the same bytes; and a flag (bool, []) on the device, which
    says that all were undamaged, where that is known only there.

    Where a device's memory begins with a payload, it must be aligned to 16 bytes. CodecError for a payload that cannot be the tensor's.
    """
    torch_dtype = getattr(torch, dtype.torch_name)
    if isinstance(codec, NvcompAns):
        return _decode_ans(payloads, hosts, dtype, shapes)
    if isinstance(codec, Groups):
        for host, shape in zip(hosts, shapes, strict=True):
            codec.check_payload(host.nbytes, dtype, shape)
        made = [device_groups.decode(payload, shape, torch_dtype, codec.bits) for payload, shape in zip(payloads, shapes, strict=True)]
        return [value for value, _ in made], torch.stack([intact for _, intact in made]).all()
    for host, shape in zip(hosts, shapes, strict=True):
        if host.nbytes != prod(shape) * dtype.itemsize:
            raise CodecError(f"raw payload of {host.nbytes} bytes for {dtype.name} {shape}")
    return [payload.view(torch_dtype).view(shape) for payload, shape in zip(payloads, shapes, strict=True)], None


def encode_host(tensor: Tensor, codec: Codec) -> Sequence[memoryview]:
    """The payload of a tensor in host memory, by way of this process's GPU."""
    if not tensor.data.nbytes:
        return (memoryview(b""),)
    flat = torch.frombuffer(tensor.data, dtype=getattr(torch, tensor.dtype.torch_name))
    payloads = encode(flat.to("cuda").view(1, *tensor.shape), codec)
    return payloads.heads[0], bytes_view(payloads.body.cpu().numpy())


def decode_host(payload: memoryview, dtype: DType, shape: tuple[int, ...], codec: Codec) -> memoryview:
    """The bytes of the tensor of a payload in host memory, by way of this process's GPU."""
    if not payload.nbytes:
        return payload
    uploaded = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to("cuda")
    decoded, intact = decode(codec, uploaded, payload, dtype, shape)
    require(intact)
    return bytes_view(decoded.contiguous().view(torch.uint8).cpu().numpy())


def require(intact: torch.Tensor | None) -> None:
    """Waits for a flag that `decode` gave. CodecError where the payload was damaged."""
    if intact is not None and not intact.item():
        raise CodecError(f"a payload is damaged; {DAMAGED}, or nvCOMP did not find what was announced")


def warm_up(codec: Codec, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Encodes and decodes zeros of a block's shape: kernels are compiled here, not in a step that is measured."""
    payloads = encode(torch.zeros((1, *shape), dtype=dtype, device=device), codec)
    host = memoryview(b"".join([payloads.heads[0], bytes_view(payloads.body.cpu().numpy())]))
    uploaded = torch.frombuffer(bytearray(host), dtype=torch.uint8).to(device)
    require(decode(codec, uploaded, host, DType.from_torch_name(str(dtype)), shape)[1])


class Clock:
    """The time that a stream takes for what is enqueued between making and stopping it; the host's own, on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._begin_ns = time.perf_counter_ns()

    def stop(self) -> None:
        self._took_ns = time.perf_counter_ns() - self._begin_ns
        if self._events:
            self._events[1].record()

    def is_done(self) -> bool:
        """`took_ns` need not wait."""
        return self._events is None or self._events[1].query()

    def took_ns(self) -> int:
        """Nanoseconds; waits for the stream."""
        if self._events is None:
            return self._took_ns
        self._events[1].synchronize()
        return int(1e6 * self._events[0].elapsed_time(self._events[1]))


def _encode_ans(tensors: torch.Tensor, dtype: DType, clock: Clock) -> Payloads:
    """All chunks of all tensors in one batch."""
    from semgap.codecs import device_planes

    ans.check_dtype(dtype)
    shape, count = tuple(tensors.shape[1:]), prod(tensors.shape[1:])
    if not count:
        raise CodecError(f"nvcomp_ans of empty tensors {shape}")
    stride = ans.padded(count)
    planes = device_planes.split(tensors.view(len(tensors), count), stride)
    largest = nvcomp.largest_output(min(count, CHUNK))
    sizes, froms, outs = _chunks(dtype, shape, len(tensors), stride, largest)
    coded = torch.empty(len(sizes) * largest, dtype=torch.uint8, device=tensors.device)
    columns = np.stack([planes.data_ptr() + froms, sizes, coded.data_ptr() + outs, froms, outs])
    table = _upload(columns, tensors.device)
    lengths, statuses = _compressed(table, columns, min(count, CHUNK))
    shrunk, taken = lengths < table[1], ans.padded(lengths)
    ends = taken.cumsum(0)
    body = torch.empty(int(ans.padded(sizes).sum()), dtype=torch.uint8, device=tensors.device)
    nothing = torch.zeros_like(lengths)
    device_planes.move(coded, body, table[4], ends - taken, torch.where(shrunk, lengths, nothing), CHUNK)
    device_planes.move(planes.flatten(), body, table[3], ends - taken, torch.where(shrunk, nothing, lengths), CHUNK)
    report = torch.cat([lengths, ends, statuses])
    clock.stop()
    lengths_there, ends_there, failed = np.split(report.cpu().numpy(), [len(sizes), 2 * len(sizes)])
    if failed.any():
        raise CodecError(f"nvCOMP could not encode a chunk: {nvcomp.status_text(int(failed[failed != 0][0]))}")
    each = len(sizes) // len(tensors)
    heads = ans.heads_of(lengths_there.reshape(-1, each))
    bounds = [0, *ends_there[each - 1 :: each].tolist()]
    return Payloads(heads, body[: bounds[-1]], bounds, clock.took_ns())


@lru_cache(maxsize=64)
def _chunks(dtype: DType, shape: tuple[int, ...], tensors: int, stride: int, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all chunks: their sizes, where they begin in planes of `stride`, and where what comes of them may lie, `largest` apart."""
    sizes = np.tile(ans.chunk_sizes(dtype, shape), tensors)
    return sizes, _offsets(len(sizes), prod(shape), stride), np.arange(len(sizes)) * largest


def _offsets(chunks: int, count: int, stride: int) -> np.ndarray:
    """Where chunks of planes of `count` bytes begin, plane by plane, `stride` bytes apart."""
    per_plane, numbers = -(-count // CHUNK), np.arange(chunks)
    return numbers // per_plane * stride + numbers % per_plane * CHUNK


def _compressed(table: torch.Tensor, columns: np.ndarray, chunk_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(lengths of all chunks, as long as the chunk where it is stored; nvCOMP's statuses), int64. What is too short is not even tried.

    `table` and, on the host, `columns` hold addresses of chunks, their sizes, and addresses for what comes out.
    """
    lengths, tried = table[1].clone(), columns[1] >= _SHORTEST
    if tried.all():
        ours, at = table, None
    else:
        ours, at = _upload(columns[:, tried], table.device), _upload(np.flatnonzero(tried), table.device)
    if not ours.shape[1]:
        return lengths, lengths.new_zeros(0)
    made = torch.zeros(ours.shape[1], dtype=torch.int64, device=table.device)
    statuses = torch.zeros(ours.shape[1], dtype=torch.int32, device=table.device)
    stream = torch.cuda.current_stream(table.device).cuda_stream
    temp_bytes = nvcomp.compress_temp_bytes(len(made), chunk_bytes, stream)
    temp = torch.empty(temp_bytes, dtype=torch.uint8, device=table.device)
    addresses = [array.data_ptr() for array in (ours[0], ours[1], made, ours[2], statuses)]
    nvcomp.compress(*addresses, chunk_bytes=chunk_bytes, chunks=len(made), temp=(temp.data_ptr(), temp_bytes), stream=stream)
    kept = torch.where((statuses == 0) & (made > 0) & (made < ours[1]), made, ours[1])
    return kept if at is None else lengths.index_copy_(0, at, kept), statuses.to(torch.int64)


def _decode_ans(
    payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """All chunks of all payloads in one batch: what it takes on the host hardly depends on how many there are."""
    from semgap.codecs import device_planes

    counts = [prod(shape) for shape in shapes]
    strides = [ans.padded(count) for count in counts]
    starts = np.cumsum([0, *(dtype.itemsize * stride for stride in strides)]).tolist()
    first = payloads[0]
    planes = torch.empty(starts[-1], dtype=torch.uint8, device=first.device)
    parts = []
    for index, (payload, host, shape) in enumerate(zip(payloads, hosts, shapes, strict=True)):
        lengths, offsets = ans.chunk_lengths(host, dtype, shape)
        tos = starts[index] + _offsets(len(lengths), counts[index], strides[index])
        parts.append(np.stack([payload.data_ptr() + offsets, lengths, ans.chunk_sizes(dtype, shape), tos]))
    froms, lengths, sizes, tos = np.concatenate(parts, axis=1)
    coded, stored = np.flatnonzero(lengths < sizes), np.flatnonzero(lengths == sizes)
    columns = [froms[coded], lengths[coded], sizes[coded], planes.data_ptr() + tos[coded]]
    table = _upload(np.concatenate([*columns, froms[stored] - first.data_ptr(), tos[stored], sizes[stored]]), first.device)
    ours, theirs = table[: 4 * len(coded)].view(4, -1), table[4 * len(coded) :].view(3, -1)
    intact = _decompress(ours, min(max(counts), CHUNK)) if len(coded) else torch.ones((), dtype=torch.bool, device=first.device)
    device_planes.move(first, planes, theirs[0], theirs[1], theirs[2], CHUNK)
    own = [planes[begin:end].view(dtype.itemsize, -1) for begin, end in pairwise(starts)]
    torch_dtype = getattr(torch, dtype.torch_name)
    return [device_planes.join(o, count, torch_dtype).view(shape) for o, count, shape in zip(own, counts, shapes, strict=True)], intact


def _decompress(table: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
    """One batched call; `table` holds addresses of what is coded, its lengths, the chunks' sizes, and their addresses. Gives a flag."""
    chunks = table.shape[1]
    stream = torch.cuda.current_stream(table.device).cuda_stream
    found = torch.zeros(chunks, dtype=torch.int64, device=table.device)
    statuses = torch.zeros(chunks, dtype=torch.int32, device=table.device)
    temp_bytes = nvcomp.decompress_temp_bytes(chunks, chunk_bytes, stream)
    temp = torch.empty(temp_bytes, dtype=torch.uint8, device=table.device)
    addresses = [array.data_ptr() for array in (table[0], table[1], table[2], found, table[3], statuses)]
    nvcomp.decompress(*addresses, chunks=chunks, temp=(temp.data_ptr(), temp_bytes), stream=stream)
    return ((statuses == 0) & (found == table[2])).all()


def _upload(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 numbers on the device, by pinned memory, which torch keeps until the copy is done."""
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64)).pin_memory().to(device, non_blocking=True)
