"""Executor `eager`: the model op by op, as transformers runs it, on any device."""

from collections.abc import Generator

import numpy as np
import torch

from semgap.codecs.gpu_clock import Clock
from semgap.engine.executor import Drawn, Executor
from semgap.engine.sampling import draw
from semgap.kv.blocks import KVCache


class EagerExecutor(Executor):
    """Runs a model op by op. The weights may arrive after it is made."""

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray, cache: KVCache) -> torch.Tensor:
        self.check_room(tokens, cache.filled)
        ids = torch.from_numpy(np.array(tokens, dtype=np.int64))[None].to(self.device)
        return self.model.base_model(input_ids=ids, past_key_values=cache.cache, use_cache=True).last_hidden_state[0]

    def decode_window(self, token: int, cache: KVCache, count: int, seed: int, request: int) -> Generator[Drawn]:
        rule = self._required_rule()
        for _ in range(count):
            clock = Clock(self.device)
            logits = self.logits(self.forward(np.array([token]), cache))
            clock.stop()
            gpu_ns = clock.gpu_ns()
            token = draw(logits[-1].float().cpu().numpy(), rule, seed, request, cache.filled).token
            yield Drawn(token, gpu_ns)
