"""The executor in the client's own process: no worker, no socket, 0 bytes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from semgap.client.runtime import Arrival, Drawing, draw_from
from semgap.codecs.arrays import to_wire
from semgap.codecs.clock import Clock
from semgap.engine.alone import DecodeAlone
from semgap.engine.device import choose_device
from semgap.engine.executor_choice import choose_executor, compiled_for, make_executor
from semgap.engine.memory_check import require_room
from semgap.engine.model_files import ModelFiles
from semgap.engine.weights import Weights
from semgap.kv.blocks import KVCache
from semgap.policy import Policy
from semgap.tensors import DType, TensorClass
from semgap.wire.ledger import Ledger
from semgap.wire.messages import Kind
from semgap.wire.step_cost import Floor


class LocalRuntime:
    """Runs the model in this process. `setup` receives the times of its set-up, in seconds."""

    def __init__(
        self,
        policy: Policy,
        model: ModelFiles,
        drawing: Drawing,
        *,
        threads: int,
        max_length: int,
        device: str,
        setup: dict[str, Any],
        handles: int = 1,
        executor: str = "auto",
    ) -> None:
        self.ledger, self.device = Ledger(), choose_device(device)
        dtype = model.digest.dtype
        self.executor_kind, reason = choose_executor(executor, self.device, dtype, model.config)
        self.executor = (self.executor_kind, reason, compiled_for(self.executor_kind))
        self._drawing = drawing
        self._all_rows = policy.reply.kind == "logits_all"
        room = (DType.from_torch_name(dtype), self.device, max_length, policy)
        require_room(model.architecture, model.specs(), *room, handles=handles, kv_budget=1.0)
        weights = self._load_weights(model, setup)
        begin = time.perf_counter()
        self._executor = make_executor(self.executor_kind, model.config, weights, dtype, threads, max_length, drawing.rule)
        setup["executor_s"] = time.perf_counter() - begin
        self._spare = [self._executor.new_cache()]
        self._alone: DecodeAlone | None = None
        self._alive: dict[int, KVCache] = {}

    def _load_weights(self, model: ModelFiles, setup: dict[str, Any]) -> Weights:
        begin = time.perf_counter()
        weights = Weights(model.specs(), self.device)
        weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
        setup["weights_load_s"] = time.perf_counter() - begin
        return weights

    def floor(self) -> Floor:
        """Measures the least that a step takes here."""
        return self._executor.floor()

    def select(self, request: int) -> None:
        self._request, self._cache = request, self._alive[request]

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._alive[request] = self._spare.pop() if self._spare else self._executor.new_cache()
        self.select(request)
        return self._forward(prompt)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        yield self._forward(np.array([token]))

    def decode_alone(self, position: int, token: int, count: int) -> list[int]:
        if self._alone is None:
            self._alone = DecodeAlone(self._executor, self._executor.new_cache())
        if not self._alone.holds(self._request, position):
            self._alone.copy(self._request, self._cache)
        return self._alone.decode(position, token, count, self._drawing.seed, self._request)[1]

    def end_request(self) -> None:
        cache = self._alive.pop(self._request)
        cache.clear()
        self._spare.append(cache)

    def evict(self, layers: Sequence[int]) -> None:
        return None

    def restore(self) -> None:
        return None

    def segments(self) -> tuple[int, int]:
        return 0, 0

    def _forward(self, tokens: np.ndarray) -> Arrival:
        clock, begin_ns = Clock(self.device), time.perf_counter_ns()
        hidden = self._executor.forward(tokens, self._cache)
        logits = to_wire(self._executor.logits(hidden if self._all_rows else hidden[-1:]), TensorClass.LOGITS)
        clock.stop()
        gpu_ns, compute_ns = clock.gpu_ns(), time.perf_counter_ns() - begin_ns
        drawn = draw_from(logits, self._drawing, self._request, self._cache.filled)
        return replace(drawn, gpu_ns=gpu_ns, compute_ns=compute_ns)
