"""The executor in the client's own process: no worker, no socket, 0 bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from semgap.client.runtime import Arrival, Drawing, draw_from
from semgap.engine.model_files import ModelFiles
from semgap.policy import Policy
from semgap.tensors import TensorClass
from semgap.wire.ledger import Ledger
from semgap.wire.messages import Kind

if TYPE_CHECKING:
    from semgap.engine.weights import Weights
    from semgap.kv.blocks import KVCache


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
        live_requests: int = 1,
        executor: str = "auto",
    ) -> None:
        import torch

        from semgap.engine.executor_choice import choose_executor, make_executor
        from semgap.engine.memory_check import require_room
        from semgap.engine.model import build_model
        from semgap.engine.torch_device import choose_device, limit_threads

        limit_threads(threads)
        self.ledger = Ledger()
        self.device = choose_device(device)
        self.executor_kind = choose_executor(executor, self.device, model.digest.dtype, model.config)
        self._drawing = drawing
        self._all_rows = policy.reply.kind == "logits_all"
        dtype = getattr(torch, model.digest.dtype)
        require_room(model.config, model.specs(), dtype, self.device, max_length, policy, handles=live_requests, kv_budget=1.0)
        built = build_model(model.config, self._load_weights(model, setup), dtype)
        begin = time.perf_counter()
        self._executor = make_executor(self.executor_kind, built, max_length, threads=threads)
        setup["executor_s"] = time.perf_counter() - begin
        self._spare = [self._executor.new_cache()]
        self._alive: dict[int, KVCache] = {}

    def _load_weights(self, model: ModelFiles, setup: dict[str, Any]) -> Weights:
        from semgap.engine.weights import Weights

        begin = time.perf_counter()
        weights = Weights(model.specs(), self.device)
        weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
        setup["weights_load_s"] = time.perf_counter() - begin
        return weights

    def select(self, request: int) -> None:
        self._request, self._cache = request, self._alive[request]

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        self._alive[request] = self._spare.pop() if self._spare else self._executor.new_cache()
        self.select(request)
        return self._forward(prompt)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        yield self._forward(np.array([token]))

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
        from semgap.codecs.gpu_clock import Clock
        from semgap.codecs.torch_tensors import to_wire

        clock = Clock(self.device)
        hidden = self._executor.forward(tokens, self._cache)
        logits = to_wire(self._executor.logits(hidden if self._all_rows else hidden[-1:]), TensorClass.LOGITS)
        clock.stop()
        return replace(draw_from(logits, self._drawing, self._request, self._cache.filled), gpu_ns=clock.gpu_ns())
