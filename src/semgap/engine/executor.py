"""The interface of an executor, which runs forward passes over KV slabs, and the parts that all executors share. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from semgap.codecs.arrays import to_wire
from semgap.engine.architecture import Architecture
from semgap.engine.batch import Rows, Run, checked_rows
from semgap.engine.memory_check import require_free
from semgap.engine.sampling import draw
from semgap.kv.block_pool import BlockPool
from semgap.kv.blocks import KVCache
from semgap.kv.pool import BLOCK, HostPool, KVPool
from semgap.policy import SamplingRule
from semgap.tensors import Array, DType, TensorClass
from semgap.wire.step_cost import Floor


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that a window's step drew, and the step's time on the GPU, or None on a CPU."""

    token: int
    gpu_ns: int | None


@dataclass(frozen=True, slots=True)
class RowDraw:
    """How a row of a batch draws: `rule`, and the numbers of the draw (sampling.draw)."""

    rule: SamplingRule
    seed: int
    request: int
    position: int


class Executor(ABC):
    """Runs a model, one request at a time or a batch of them. Holds no state of a request: the cache is the caller's.

    Local modes call it in the client's process, the worker calls the same one behind a link. `decode_window` draws by `rule`. `device` is
    'cpu' or 'cuda'. Hidden states and logits are numpy arrays with executor fused, else torch tensors.
    """

    def __init__(self, model: Architecture, dtype: DType, device: str, max_length: int, rule: SamplingRule | None = None) -> None:
        model.require_length(max_length)
        self.device, self.dtype = device, dtype
        self.vocab_size, self.kv_shape = model.vocab, model.kv_shape(max_length)
        self._rule = rule

    @abstractmethod
    def forward(self, tokens: np.ndarray, cache: KVCache) -> Array:
        """Final hidden states (n, hidden) of `tokens` (n,), int64, which follow the content of `cache`; appends keys and values.

        Raises as `check_room`, before anything is appended.
        """

    @abstractmethod
    def logits(self, hidden: Array) -> Array:
        """Logits (n, vocab) of final hidden states (n, hidden)."""

    @abstractmethod
    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        """Feeds `token`, then each drawn token, up to `count` steps. `seed` and `request` are the draw's. Close it to stop earlier.

        Raises as `check_room` once there is no more room; ValueError without a rule.
        """

    @abstractmethod
    def forward_batch(self, runs: Sequence[Run], pool: BlockPool) -> Array:
        """Final hidden states (m, hidden) of the last token of each run that draws, in order, after one pass over all runs.

        Writes the runs' keys and values into their blocks of `pool`, which `new_block_pool` made. Raises as `checked_rows`.
        """

    def draw_rows(self, hidden: Array, draws: Sequence[RowDraw]) -> list[int | ValueError]:
        """The tokens that follow final hidden states (m, hidden), one a draw; the error of a row whose logits give none."""
        rows = to_wire(self.logits(hidden), TensorClass.LOGITS).as_float32()
        return [_drawn(row, each) for row, each in zip(rows, draws, strict=True)]

    def checked_rows(self, runs: Sequence[Run], pool: BlockPool) -> Rows:
        """The runs' rows. Raises as batch.checked_rows; ValueError for a pool of another model's blocks, or of another dtype."""
        own, theirs = (replace(shape, max_length=BLOCK) for shape in (self.kv_shape, pool.shape))
        if (own, self.dtype) != (theirs, pool.dtype):
            raise ValueError(f"the pool holds blocks of {pool.dtype.name} {theirs}; this executor needs {self.dtype.name} {own}")
        return checked_rows(runs, self.vocab_size, self.kv_shape.max_length, pool.blocks)

    def floor(self) -> Floor:
        """Measures how fast this core reads, for the least that a step takes. Takes some passes over the weights."""
        return Floor(None, None, "not measured: executor fused measures it")

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the KV memory of one handle."""
        return self.kv_shape.nbytes(self.dtype.itemsize)

    def new_pool(self, budget_bytes: int) -> KVPool:
        """KV memory for as many slabs as fit `budget_bytes`. ModelError if the device has less, KVBudgetError for less than one cache."""
        require_free("a KV cache needs", budget_bytes, self.device)
        if self.device == "cpu":
            return HostPool(self.kv_shape, self.dtype, budget_bytes)
        from semgap.kv.gpu_pool import GpuPool

        return GpuPool(self.kv_shape, self.dtype, self.device, budget_bytes)

    def new_cache(self) -> KVCache:
        """An empty KV cache of max_length positions, in memory of its own. ModelError if it does not fit."""
        return KVCache(self.new_pool(self.cache_nbytes))

    def new_block_pool(self, blocks: int) -> BlockPool:
        """KV memory of so many blocks, for `forward_batch`. ModelError if the device has less."""
        nbytes = self._block_pool_nbytes(blocks)
        if self.device == "cpu":
            return BlockPool(self.kv_shape, self.dtype, nbytes)
        from semgap.kv.gpu_block_pool import GpuBlockPool

        return GpuBlockPool(self.kv_shape, self.dtype, self.device, nbytes)

    def check_room(self, tokens: np.ndarray, filled: int) -> None:
        """ValueError for a token outside the vocabulary, or if the tokens do not fit after `filled` positions."""
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens must be 1 or more ids in 0..{self.vocab_size - 1}")
        if filled + tokens.size > self.kv_shape.max_length:
            raise ValueError(f"{filled} + {tokens.size} positions do not fit max_length {self.kv_shape.max_length}")

    def _block_pool_nbytes(self, blocks: int) -> int:
        """Bytes of so many blocks. ModelError if the device has less."""
        nbytes = blocks * replace(self.kv_shape, max_length=BLOCK).nbytes(self.dtype.itemsize)
        require_free("the engine's KV blocks need", nbytes, self.device)
        return nbytes

    def _required_rule(self) -> SamplingRule:
        """The sampling rule. ValueError without one."""
        if self._rule is None:
            raise ValueError("this executor was made without a sampling rule; its windows cannot draw")
        return self._rule


def _drawn(row: np.ndarray, given: RowDraw) -> int | ValueError:
    try:
        return draw(row, given.rule, given.seed, given.request, given.position).token
    except ValueError as error:
        return error
