"""nvCOMP's batched ANS, by its C interface: every call is enqueued on the caller's stream and allocates nothing.

nvCOMP's Python wrapper would make streams and memory of its own; here both are torch's. Structures: nvcomp/ans.h, version 6.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

from semgap.codecs.base import CodecError

ALIGNMENT = 16  # of all buffers; nvcompANSRequiredCompressionAlignment, nvcompANSRequiredDecompressionAlignment
MAJOR = 6
_UCHAR, _BITS = 1, 0xFF  # nvcompType_t: bytes; "read the type from the stream"
_CUDA_ERROR = 1000  # nvcompStatus_t
_SIZE = ctypes.c_size_t
_POINTER = ctypes.c_void_p


class _Properties(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32))


class _Options(ctypes.Structure):
    """Of compressing and of decompressing, which are laid out alike: the first is a type or a backend, the fifth a histogram's reduction
    or a flag to skip validation."""

    _fields_ = (
        *(("kind", ctypes.c_int), ("data_type", ctypes.c_int), ("max_sub_chunk_count", ctypes.c_uint8)),
        *(("states_per_lane", ctypes.c_uint8), ("reduction_or_skip", ctypes.c_uint8), ("reserved", ctypes.c_char * 53)),
    )


_ENCODING, _DECODING = _Options(0, _UCHAR), _Options(0, _BITS)  # all else 0: nvCOMP's defaults


@cache
def library() -> ctypes.CDLL:
    """libnvcomp of the wheels nvidia-libnvcomp-cu13 or -cu12, loaded once. ImportError if it is missing, CodecError for another major
    version than 6.

    Found as a file: another wheel's nvidia/__init__.py in a different directory would hide `import nvidia.libnvcomp`.
    """
    candidates = [Path(entry) / "nvidia/libnvcomp/lib64" / f"libnvcomp.so.{MAJOR}" for entry in sys.path]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise ImportError(f"no nvidia/libnvcomp/lib64/libnvcomp.so.{MAJOR} along sys.path")
    found = ctypes.CDLL(str(file))
    properties = _Properties()
    found.nvcompGetProperties(ctypes.byref(properties))
    if properties.version // 1000 != MAJOR:
        raise CodecError(f"nvCOMP {properties.version // 1000} is installed, and codec 'nvcomp_ans' needs version {MAJOR}")
    found.nvcompGetStatusString.restype = ctypes.c_char_p
    found.nvcompBatchedANSCompressGetMaxOutputChunkSize.argtypes = (_SIZE, _Options, ctypes.POINTER(_SIZE))
    found.nvcompBatchedANSCompressGetTempSize.argtypes = (_SIZE, _SIZE, _Options, ctypes.POINTER(_SIZE), _SIZE, _POINTER)
    found.nvcompBatchedANSDecompressGetTempSize.argtypes = (_SIZE, _SIZE, _Options, ctypes.POINTER(_SIZE), _SIZE, _POINTER)
    found.nvcompBatchedANSCompressAsync.argtypes = (
        *(_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER),
        *(_Options, _POINTER, _POINTER),
    )
    found.nvcompBatchedANSDecompressAsync.argtypes = (
        *(_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER),
        *(_Options, _POINTER, _POINTER),
    )
    return found


def largest_output(chunk_bytes: int) -> int:
    """The most bytes that a coded chunk of `chunk_bytes` can take, rounded up to ALIGNMENT."""
    size = _SIZE()
    _check(library().nvcompBatchedANSCompressGetMaxOutputChunkSize(chunk_bytes, _ENCODING, ctypes.byref(size)))
    return -(-size.value // ALIGNMENT) * ALIGNMENT


def compress_temp_bytes(chunks: int, chunk_bytes: int, stream: int) -> int:
    """Bytes of workspace on the device for `chunks` chunks of at most `chunk_bytes`."""
    size = _SIZE()
    call = library().nvcompBatchedANSCompressGetTempSize
    _check(call(chunks, chunk_bytes, _ENCODING, ctypes.byref(size), chunks * chunk_bytes, stream))
    return size.value


def decompress_temp_bytes(chunks: int, chunk_bytes: int, stream: int) -> int:
    """The same for decompressing."""
    size = _SIZE()
    call = library().nvcompBatchedANSDecompressGetTempSize
    _check(call(chunks, chunk_bytes, _DECODING, ctypes.byref(size), chunks * chunk_bytes, stream))
    return size.value


def compress(
    sources: int,
    sizes: int,
    lengths: int,
    targets: int,
    statuses: int,
    *,
    chunk_bytes: int,
    chunks: int,
    temp: tuple[int, int],
    stream: int,
) -> None:
    """Enqueues the compression of a batch: chunks of `sizes` bytes at `sources` go to `targets`; `lengths` receives the coded lengths.

    The first five are device addresses: of u64 arrays, one entry a chunk, and of i32 statuses. `temp` is a workspace, address and bytes.
    """
    call = library().nvcompBatchedANSCompressAsync
    _check(call(sources, sizes, chunk_bytes, chunks, *temp, targets, lengths, _ENCODING, statuses, stream))


def decompress(
    sources: int, lengths: int, sizes: int, found: int, targets: int, statuses: int, *, chunks: int, temp: tuple[int, int], stream: int
) -> None:
    """Enqueues the decompression of a batch into buffers of `sizes` bytes; `found` receives the decoded lengths. Addresses as above."""
    call = library().nvcompBatchedANSDecompressAsync
    _check(call(sources, lengths, sizes, found, chunks, *temp, targets, _DECODING, statuses, stream))


def status_text(status: int) -> str:
    """nvCOMP's name of a status."""
    return (library().nvcompGetStatusString(status) or b"unknown").decode()


def _check(status: int) -> None:
    if status == _CUDA_ERROR:  # a failure of the GPU, here or in earlier work: any other payload or codec would meet it too
        raise RuntimeError("CUDA error, reported by nvCOMP, of its own or earlier work on the GPU")
    if status:
        raise CodecError(f"nvCOMP refused a batch: {status_text(status)} ({status})")
