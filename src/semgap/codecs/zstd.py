"""Plain zstandard over a tensor's bytes, and the frames that planes_zstd shares."""

import threading
from collections.abc import Sequence

import zstandard

from semgap.codecs.base import Codec, CodecError
from semgap.tensors import DType, Tensor, nbytes_of

_LARGEST_WINDOW_BYTES = 1 << 19  # of level 1; no frame of ours, of any level, needs more than this and more than its content


class Frames(threading.local):
    """Zstd frames of known length, one thread, no checksum. A context serves one thread at a time, so each thread keeps its own.

    `parameters` replace the level's, such as hash_log.
    """

    def __init__(self, level: int = 1, **parameters: int) -> None:
        options = {"write_checksum": 0, "write_content_size": 1, "write_dict_id": 0} | parameters
        self._compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(level, **options))
        self._decompressor = zstandard.ZstdDecompressor()

    def pack(self, data: memoryview) -> memoryview:
        """A frame of `data`, or `data` itself if the frame is no shorter: the length tells which."""
        if not data.nbytes:
            return data
        frame = memoryview(self._compressor.compress(data))
        return frame if frame.nbytes < data.nbytes else data

    def unpack(self, payload: memoryview, expected: int) -> memoryview:
        """The original `expected` bytes, an alias of `payload` if it is stored. CodecError for anything else.

        Never allocates more than `expected` and one window, whatever the frame claims: zstd refuses a frame that differs from its own
        header, so checking the header is enough.
        """
        if payload.nbytes == expected:
            return payload
        if payload.nbytes > expected:
            raise CodecError(f"zstd payload of {payload.nbytes} bytes for {expected}; it is never longer than its content")
        try:
            frame = zstandard.get_frame_parameters(payload)
            if frame.content_size != expected or frame.dict_id or frame.window_size > max(expected, _LARGEST_WINDOW_BYTES):
                raise CodecError(f"zstd payload does not hold exactly the {expected} announced bytes")
            return memoryview(self._decompressor.decompress(payload, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise CodecError(f"zstd payload is damaged: {error}") from error


class Zstd(Codec):
    """Zstandard over the bytes in their order, without knowledge of the tensor. Exact, never longer than raw.

    Level 1 in the modes (benchmarks/zstd_levels.py); any level decodes frames of any other.
    No checksum of its own (frames on the wire have one): damage within a frame may give other values, never another size.
    """

    name, code, exact = "zstd", 3, True

    def __init__(self, level: int = 1) -> None:
        self._frames = Frames(level)

    def encode(self, tensor: Tensor) -> Sequence[memoryview]:
        return (self._frames.pack(tensor.data),)

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        return self._frames.unpack(payload, nbytes_of(dtype, shape))
