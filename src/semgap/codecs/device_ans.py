"""Codec nvcomp_ans on a GPU: all chunks of all tensors in one batch, since the host's work hardly depends on their number."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import torch

from semgap.codecs import device_planes, nvcomp
from semgap.codecs.ans_format import CHUNK, check_dtype, chunk_lengths, chunk_sizes, heads_of, padded
from semgap.codecs.base import CodecError, Payloads
from semgap.codecs.clock import Clock
from semgap.tensors import DType

_SHORTEST = 1024  # bytes; nvCOMP's tables alone take half of that


def encode(tensors: torch.Tensor, dtype: DType) -> Payloads:
    """The payloads of contiguous tensors [b, ...]. CodecError for integers, empty tensors, and a chunk that nvCOMP cannot encode."""
    check_dtype(dtype)
    shape, count = tuple(tensors.shape[1:]), prod(tensors.shape[1:])
    if not count:
        raise CodecError(f"nvcomp_ans of empty tensors {shape}")
    clock = Clock(tensors.device)
    stride = padded(count)
    planes = device_planes.split(tensors.view(len(tensors), count), stride)
    largest = nvcomp.largest_output(min(count, CHUNK))
    sizes, froms, outs = _chunks(dtype, shape, len(tensors), stride, largest)
    coded = torch.empty(len(sizes) * largest, dtype=torch.uint8, device=tensors.device)
    columns = np.stack([planes.data_ptr() + froms, sizes, coded.data_ptr() + outs, froms, outs])
    table = _upload(columns, tensors.device)
    longest = min(count, CHUNK)
    lengths, statuses = _compressed(table, columns, longest)
    body, ends = _packed(planes, coded, table, lengths, int(padded(sizes).sum()), longest)
    report = torch.cat([lengths, ends, statuses])
    clock.stop()
    lengths_there, ends_there, failed = np.split(report.cpu().numpy(), [len(sizes), 2 * len(sizes)])
    if failed.any():
        raise CodecError(f"nvCOMP could not encode a chunk: {nvcomp.status_text(int(failed[failed != 0][0]))}")
    each = len(sizes) // len(tensors)
    bounds = [0, *ends_there[each - 1 :: each].tolist()]
    return Payloads(heads_of(lengths_there.reshape(-1, each)), body[: bounds[-1]], bounds, clock.took_ns())


@lru_cache(maxsize=64)
def _chunks(dtype: DType, shape: tuple[int, ...], tensors: int, stride: int, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all chunks: sizes, offsets in planes of `stride`, and offsets of the coded chunks, `largest` apart."""
    sizes = np.tile(chunk_sizes(dtype, shape), tensors)
    return sizes, _offsets(len(sizes), prod(shape), stride), np.arange(len(sizes)) * largest


def _offsets(chunks: int, count: int, stride: int) -> np.ndarray:
    """Where chunks of planes of `count` bytes begin, plane by plane, `stride` bytes apart."""
    per_plane, numbers = -(-count // CHUNK), np.arange(chunks)
    return numbers // per_plane * stride + numbers % per_plane * CHUNK


def _compressed(table: torch.Tensor, columns: np.ndarray, chunk_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(lengths of all chunks, a stored one's being its size; nvCOMP's statuses), int64. Chunks below _SHORTEST are stored untried.

    `table` and, on the host, `columns` hold the chunks' addresses, their sizes, and the addresses of the output.
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


def _packed(
    planes: torch.Tensor, coded: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, room: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks, of `longest` bytes at most, back to back in `room` bytes, coded if that is shorter, else stored; and the chunks' ends."""
    shrunk, taken = lengths < table[1], padded(lengths)
    ends = taken.cumsum(0)
    body = torch.empty(room, dtype=torch.uint8, device=planes.device)
    nothing = torch.zeros_like(lengths)
    device_planes.move(coded, body, table[4], ends - taken, torch.where(shrunk, lengths, nothing), longest)
    device_planes.move(planes.flatten(), body, table[3], ends - taken, torch.where(shrunk, nothing, lengths), longest)
    return body, ends


def decode(
    payloads: Sequence[torch.Tensor], hosts: Sequence[memoryview], dtype: DType, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As Codec.decode_on_device."""
    counts = [prod(shape) for shape in shapes]
    strides = [padded(count) for count in counts]
    starts = np.cumsum([0, *(dtype.itemsize * stride for stride in strides)]).tolist()
    first = payloads[0]
    planes = torch.empty(starts[-1], dtype=torch.uint8, device=first.device)
    parts = []
    for index, (payload, host, shape) in enumerate(zip(payloads, hosts, shapes, strict=True)):
        lengths, offsets = chunk_lengths(host, dtype, shape)
        tos = starts[index] + _offsets(len(lengths), counts[index], strides[index])
        parts.append(np.stack([payload.data_ptr() + offsets, lengths, chunk_sizes(dtype, shape), tos]))
    intact = _unpack(np.concatenate(parts, axis=1), first, planes, min(max(counts), CHUNK))
    own = [planes[begin:end].view(dtype.itemsize, -1) for begin, end in pairwise(starts)]
    torch_dtype = getattr(torch, dtype.torch_name)
    return [device_planes.join(o, count, torch_dtype).view(shape) for o, count, shape in zip(own, counts, shapes, strict=True)], intact


def _unpack(chunks: np.ndarray, first: torch.Tensor, planes: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
    """Fills `planes` from chunks (addresses, lengths, sizes, offsets in `planes`) and gives a flag, true if all were undamaged.

    Stored chunks are addressed from the payload `first`, which may lead to other memory.
    """
    froms, lengths, sizes, tos = chunks
    coded, stored = np.flatnonzero(lengths < sizes), np.flatnonzero(lengths == sizes)
    columns = [froms[coded], lengths[coded], sizes[coded], planes.data_ptr() + tos[coded]]
    table = _upload(np.concatenate([*columns, froms[stored] - first.data_ptr(), tos[stored], sizes[stored]]), first.device)
    ours, theirs = table[: 4 * len(coded)].view(4, -1), table[4 * len(coded) :].view(3, -1)
    intact = _decompress(ours, chunk_bytes) if len(coded) else torch.ones((), dtype=torch.bool, device=first.device)
    device_planes.move(first, planes, theirs[0], theirs[1], theirs[2], chunk_bytes)
    return intact


def _decompress(table: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
    """One batched call, and a flag. `table` holds the addresses of coded chunks, their lengths, the chunks' sizes, and their addresses."""
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
