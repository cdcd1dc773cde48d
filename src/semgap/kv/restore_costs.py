"""The cost model of recovery `auto`: times and ratios that were measured in this session."""

from collections.abc import Sequence
from dataclasses import dataclass

_NEW_WEIGHT = 0.3  # of a new measurement in a running mean


@dataclass
class Costs:
    """Running means of this session's measurements; None until the first one."""

    round_trip_s: float = 0.0
    bytes_per_s: float | None = None
    decode_bytes_per_s: float | None = None  # tensor bytes out of the KV codec
    codec_ratio: float | None = None  # tensor bytes over payload bytes
    prefill_tokens_per_s: float | None = None
    step_s: float | None = None  # a pass of one token

    def learn(self, name: str, value: float) -> None:
        """Adds a measurement to a running mean."""
        before = getattr(self, name)
        setattr(self, name, value if before is None else (1 - _NEW_WEIGHT) * before + _NEW_WEIGHT * value)

    def learn_pass(self, tokens: int, took_s: float) -> None:
        """Adds the time of a forward pass over `tokens`."""
        if tokens > 1:
            self.learn("prefill_tokens_per_s", tokens / took_s)
        else:
            self.learn("step_s", took_s)

    def fetch_s(self, tensor_bytes: int, is_coded: bool) -> float | None:
        """Predicted seconds of a fetch, decoding included if the blocks were saved in the KV codec; None if the bandwidth is unknown."""
        ratio = (self.codec_ratio or 1.0) if is_coded else 1.0
        return self.fetch_payload_s(tensor_bytes / ratio, tensor_bytes if is_coded else 0)

    def fetch_payload_s(self, payload_bytes: float, decoded_bytes: int) -> float | None:
        """Predicted seconds of a fetch of a known payload, of which so many tensor bytes are decoded; None if the bandwidth is unknown."""
        if self.bytes_per_s is None:
            return None
        decode_s = decoded_bytes / self.decode_bytes_per_s if decoded_bytes and self.decode_bytes_per_s else 0.0
        return self.round_trip_s + payload_bytes / self.bytes_per_s + decode_s

    def recompute_s(self, passes: Sequence[int]) -> float | None:
        """Predicted seconds of forward passes, given the tokens of each; None if a time is unknown."""
        prefilled, steps = sum(tokens for tokens in passes if tokens > 1), sum(tokens == 1 for tokens in passes)
        if (prefilled and self.prefill_tokens_per_s is None) or (steps and self.step_s is None):
            return None
        return (prefilled / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0) + steps * (self.step_s or 0.0)

    def codec_pays(self) -> bool:
        """True below the break-even bandwidth: a byte that the codec saves takes longer to cross than to decode."""
        if not self.bytes_per_s or not self.codec_ratio or not self.decode_bytes_per_s:
            return False
        return 1 / (self.codec_ratio * self.bytes_per_s) + 1 / self.decode_bytes_per_s < 1 / self.bytes_per_s
