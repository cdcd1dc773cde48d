"""What restoring KV blocks costs, measured in this session: the cost model of recovery `auto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NEW_WEIGHT = 0.3  # of a new measurement in a running mean


@dataclass
class Costs:
    """What `auto` knows, all of it measured in this session: running means. Null until it was."""

    round_trip_s: float = 0.0
    bytes_per_s: float | None = None
    decode_bytes_per_s: float | None = None  # tensor bytes out of the KV codec
    codec_ratio: float | None = None  # tensor bytes over payload bytes
    prefill_tokens_per_s: float | None = None
    step_s: float | None = None  # a pass of one token

    def learn(self, name: str, value: float) -> None:
        """Takes a new measurement into a running mean."""
        before = getattr(self, name)
        setattr(self, name, value if before is None else (1 - _NEW_WEIGHT) * before + _NEW_WEIGHT * value)

    def fetch_s(self, payload_bytes: float, decoded_bytes: float) -> float | None:
        """Predicted seconds until so many payload bytes are here, `decoded_bytes` of tensors decoded out of them."""
        if self.bytes_per_s is None:
            return None
        decode_s = decoded_bytes / self.decode_bytes_per_s if decoded_bytes and self.decode_bytes_per_s else 0.0
        return self.round_trip_s + payload_bytes / self.bytes_per_s + decode_s

    def learn_pass(self, tokens: int, took_s: float) -> None:
        """Takes the time of a forward pass over so many tokens."""
        if tokens > 1:
            self.learn("prefill_tokens_per_s", tokens / took_s)
        else:
            self.learn("step_s", took_s)

    def recompute_s(self, passes: Sequence[int]) -> float | None:
        """Predicted seconds of passes over so many tokens each."""
        prefilled, steps = sum(tokens for tokens in passes if tokens > 1), sum(tokens == 1 for tokens in passes)
        if (prefilled and self.prefill_tokens_per_s is None) or (steps and self.step_s is None):
            return None
        return (prefilled / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0) + steps * (self.step_s or 0.0)

    def codec_pays(self) -> bool:
        """Below the break-even bandwidth: a byte that the codec saves takes longer to cross than to decode."""
        if not self.bytes_per_s or not self.codec_ratio or not self.decode_bytes_per_s:
            return False
        return 1 / (self.codec_ratio * self.bytes_per_s) + 1 / self.decode_bytes_per_s < 1 / self.bytes_per_s
