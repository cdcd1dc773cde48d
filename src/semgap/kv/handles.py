"""A handle: its cache, and the tokens of its passes."""

from dataclasses import dataclass, field

import numpy as np

from semgap.codecs import codec_of
from semgap.kv.blocks import KVCache
from semgap.kv.transfer import Undecoded
from semgap.wire.step_cost import Recovered


class UnknownHandle(ValueError):
    """A handle that is not open in this session. `code` travels in error frames."""

    code = "handle"


class TooManyHandles(ValueError):
    """As many handles are open as the session may hold. `code` travels in error frames."""

    code = "handle"


class RecoveryError(ValueError):
    """Blocks that could be neither restored nor recomputed. The handle stays as it was. `code` travels in error frames."""

    code = "recovery"


@dataclass
class Fed:
    """The tokens of one forward pass; the first `kept` still count. A replay in the same shapes is bitwise the same."""

    tokens: np.ndarray
    kept: int


@dataclass
class Live:
    """An open handle: its cache, its request, the tokens of its passes, and its last use (a count of uses).

    `codec` is the codec of its saved blocks (AUTO: of each its own), or None until a block is saved in one; `codes` [layers, blocks] are
    the wire codes of those in which its blocks were saved last. `room` is the record of the room that was made for
    it, until its first step. While a prefix is fetched for it, `payload_bytes` are those of the prefix, and `coming` tokens follow it.
    `undecoded` are missing blocks that came already. `recomputes`: its blocks lie nowhere else, and whoever opened it knows.
    `hands_over`: its first pass is for another worker.
    """

    number: int
    cache: KVCache
    request: int
    kv_id: bytes
    fed: list[Fed] = field(default_factory=list)
    used: int = 0
    codec: str | None = None
    room: Recovered | None = None
    recomputes: bool = False
    hands_over: bool = False
    payload_bytes: int = 0
    coming: int = 0
    undecoded: list[Undecoded] = field(default_factory=list)
    codes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.codes = np.zeros(self.cache.missing.shape, dtype=np.int64)

    @property
    def is_coded(self) -> bool:
        """True if blocks of it are saved in a codec other than raw."""
        return bool(self.codes.any())

    def saved_bytes(self, blocks: np.ndarray) -> dict[str, int]:
        """Tensor bytes of blocks, true in [layers, blocks], by the codec in which they were saved."""
        by_code = {code: self.cache.bytes_of(blocks & (self.codes == code)) for code in np.unique(self.codes[blocks]).tolist()}
        return {codec_of(code).name: nbytes for code, nbytes in by_code.items()}

    def tokens(self) -> np.ndarray:
        """All tokens of the cache, in order."""
        return np.concatenate([np.zeros(0, np.int64), *(fed.tokens[: fed.kept] for fed in self.fed)])
