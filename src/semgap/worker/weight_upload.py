"""The weights of a session's model on their way into memory: over the wire, or out of the worker's store."""

from collections.abc import Sequence

from semgap.engine.weights import Weights, fill
from semgap.policy import Policy
from semgap.tensors import TensorClass
from semgap.wire import messages
from semgap.wire.frames import Frame, FrameError, Memory
from semgap.wire.ledger import Direction
from semgap.wire.link import Link, Refused
from semgap.wire.messages import Header, TensorHeader
from semgap.worker.resources import Resources
from semgap.worker.weight_store import HASH_BYTES, Draft, FalseHash, StoreFull


class WeightUpload:
    """Fills the memory of one model's weights, as the policy says: in every step, once, or by hash.

    A weight counts as filled once it came in a checked frame, or out of the store. By hash, the weights that the store lacks are written
    to a draft as they arrive, which the store keeps once all have come.
    """

    def __init__(self, link: Link, weights: Weights, policy: Policy, resources: Resources) -> None:
        self.weights = weights
        self._link, self._policy, self._resources = link, policy, resources
        self._filled: set[int] = set()
        self._draft: Draft | None = None

    @property
    def missing(self) -> int:
        """The number of weights that are not filled."""
        return len(self.weights.specs) - len(self._filled)

    def offer(self, request: Frame) -> tuple[int, ...]:
        """Indices of the weights that the client must send before the first step. Fills those that the store holds.

        Refused for hashes of another number, StoreFull if the store has no room for the weights.
        """
        if self._policy.weights == "every_step":
            return ()
        every = range(len(self.weights.specs))
        if self._policy.weights == "once":
            return tuple(every)
        hashes, store = offered_hashes(request, len(self.weights.specs)), self._resources.store
        store.require_budget(self.weights.nbytes)
        store.refresh()
        self._fill_from_store(hashes)
        self._count_copies(request)
        lacking = tuple(index for index in every if index not in self._filled)
        if lacking:
            digests, sizes = {index: hashes[index] for index in lacking}, {index: self.weights.sizes[index] for index in lacking}
            self._draft = store.begin(digests, sizes, self.weights.slot_bytes, self._resources.io_cpus)
        return lacking

    def destinations(self, header: Header) -> Sequence[Memory | None]:
        """Where a frame's payloads are received: raw weights go to the model's memory, all else (None) to the receive arena."""
        indices = self._indices(header)
        if not indices or len(indices) > len(header.tensors):
            return [None] * len(header.tensors)
        return [self._memory(t, indices[i]) if i < len(indices) else None for i, t in enumerate(header.tensors)]

    def put(self, request: Frame) -> bool:
        """Takes a frame of weights. True for the last one, which wants an answer: all bytes are in the model's memory and the store."""
        put = request.header_as(messages.PutWeights)
        self.take(request)
        if put.last:
            self._keep()
            self.weights.settle()
        return put.last

    def take(self, request: Frame) -> None:
        """Decodes a frame's encoded weights, and counts all its weights as filled."""
        indices, tensors = self._indices(request.header), request.header.tensors
        if len(indices) > len(tensors):
            raise FrameError("weights", f"{len(indices)} weights announced, {len(tensors)} tensors came")
        for position, index in enumerate(indices):
            self._check(tensors[position], index)
            if tensors[position].codec:
                sink = self.weights.sink(index)
                fill(self._draft.through(index, sink) if self._draft else sink, self._link.decode(request, position).data)
        self._filled.update(indices)
        self._count_copies(request)

    def discard(self) -> None:
        """Gives up an unfinished draft."""
        if self._draft:
            self._draft.discard()
        self._draft = None

    def _indices(self, header: Header) -> Sequence[int]:
        """The weights that a frame's first tensors are."""
        if isinstance(header, messages.PutWeights):
            return header.indices
        if isinstance(header, messages.Forward) and self._policy.weights == "every_step":
            return range(len(self.weights.specs))
        return ()

    def _memory(self, tensor: TensorHeader, index: int) -> Memory | None:
        self._check(tensor, index)
        if tensor.codec:
            return None
        return self._draft.through(index, self.weights.sink(index)) if self._draft else self.weights.destination(index)

    def _check(self, tensor: TensorHeader, index: int) -> None:
        if index >= len(self.weights.specs):
            raise FrameError("weights", f"weight {index} of {len(self.weights.specs)}")
        spec = self.weights.specs[index]
        if (tensor.cls, tensor.dtype, tensor.shape) != (TensorClass.WEIGHTS, spec.dtype, spec.shape):
            raise FrameError("weights", f"weight {spec.name!r} is {spec.dtype.name} {spec.shape}, got {tensor.dtype.name} {tensor.shape}")

    def _fill_from_store(self, hashes: Sequence[bytes]) -> None:
        store, sizes = self._resources.store, self.weights.sizes
        offered = list(enumerate(hashes))
        read = [i for i, digest in offered if store.has(digest, sizes[i]) and store.read_into(digest, self.weights.sink(i))]
        self._filled.update(i for i in read if store.has(hashes[i], sizes[i]))  # the store drops a damaged upload as a whole
        self.weights.settle()

    def _keep(self) -> None:
        """Gives a whole upload to later sessions. If that fails, its weights do not count in this session either."""
        draft, self._draft = self._draft, None
        if draft is None:
            return
        try:
            draft.finish()
        except (FalseHash, StoreFull):
            self._filled.clear()
            raise

    def _count_copies(self, request: Frame) -> None:
        copied = self.weights.take_copied()
        if copied:
            self._link.ledger.count_copy(Direction.UP, request.operation, request.kind, TensorClass.WEIGHTS, copied)


def offered_hashes(request: Frame, count: int) -> list[bytes]:
    """The hashes of `count` weights, which an offer by hash brings. Refused if it does not."""
    if len(request.payloads) != 1 or request.payloads[0].nbytes != count * HASH_BYTES:
        raise Refused("weights", f"an offer by hash brings {HASH_BYTES} bytes for each of its {count} weights")
    joined = bytes(request.payloads[0])
    return [joined[start : start + HASH_BYTES] for start in range(0, len(joined), HASH_BYTES)]
