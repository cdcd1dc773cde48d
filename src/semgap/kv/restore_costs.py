"""The cost model of recovery `auto`, and of the choice of codecs: times and ratios that were measured in this session."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

from semgap.kv.codec_choice import CodecSpeed

_NEW_WEIGHT = 0.3  # of a new measurement in a running mean


@dataclass
class Costs:
    """Running means of this session's measurements; None, or no speed of a codec, until the first one."""

    round_trip_s: float = 0.0
    bytes_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    step_s: float | None = None  # a pass of one token
    codecs: dict[str, CodecSpeed] = field(default_factory=lambda: {"raw": CodecSpeed()})

    def learn(self, name: str, value: float) -> None:
        """Adds a measurement to a running mean."""
        setattr(self, name, _mean(getattr(self, name), value))

    def learn_codec(self, name: str, speed: CodecSpeed) -> None:
        """Adds a measurement of a codec."""
        before = self.codecs.get(name)
        self.codecs[name] = speed if before is None else CodecSpeed(*map(_mean, astuple(before), astuple(speed)))

    def learn_pass(self, tokens: int, took_s: float) -> None:
        """Adds the time of a forward pass over `tokens`."""
        if tokens > 1:
            self.learn("prefill_tokens_per_s", tokens / took_s)
        else:
            self.learn("step_s", took_s)

    def fetched_s_per_byte(self, codec: str) -> float | None:
        """Seconds in which a tensor byte crosses in a codec and is decoded; None if the bandwidth is unknown. A codec that was not measured
        counts as raw."""
        if self.bytes_per_s is None:
            return None
        speed = self.codecs.get(codec, CodecSpeed())
        return 1 / (speed.ratio * self.bytes_per_s) + 1 / speed.decode_bytes_per_s

    def sent_s_per_byte(self, codec: str) -> float | None:
        """The same of a tensor byte that is encoded and crosses."""
        if self.bytes_per_s is None:
            return None
        speed = self.codecs.get(codec, CodecSpeed())
        return 1 / (speed.ratio * self.bytes_per_s) + 1 / speed.encode_bytes_per_s

    def payload_bytes(self, tensor_bytes: Mapping[str, int]) -> float:
        """Predicted bytes of tensor bytes by codec as they cross."""
        return sum(nbytes / self.codecs.get(codec, CodecSpeed()).ratio for codec, nbytes in tensor_bytes.items())

    def fetch_s(self, tensor_bytes: Mapping[str, int]) -> float | None:
        """Predicted seconds of a fetch of tensor bytes by codec, decoding included; None if the bandwidth is unknown."""
        if self.bytes_per_s is None:
            return None
        return self.round_trip_s + sum(nbytes * (self.fetched_s_per_byte(codec) or 0.0) for codec, nbytes in tensor_bytes.items())

    def fetch_payload_s(self, payload_bytes: float, tensor_bytes: int, codecs: Iterable[str]) -> float | None:
        """Predicted seconds of a fetch of a known payload, in any of `codecs`: decoded by the slowest, unless it is raw."""
        if self.bytes_per_s is None:
            return None
        slowest = min(self.codecs.get(codec, CodecSpeed()).decode_bytes_per_s for codec in codecs)
        decode_s = tensor_bytes / slowest if payload_bytes != tensor_bytes else 0.0
        return self.round_trip_s + payload_bytes / self.bytes_per_s + decode_s

    def recompute_s(self, passes: Sequence[int]) -> float | None:
        """Predicted seconds of forward passes, given the tokens of each; None if a time is unknown."""
        prefilled, steps = sum(tokens for tokens in passes if tokens > 1), sum(tokens == 1 for tokens in passes)
        if (prefilled and self.prefill_tokens_per_s is None) or (steps and self.step_s is None):
            return None
        return (prefilled / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0) + steps * (self.step_s or 0.0)

    def quickest(self, codecs: Iterable[str]) -> str:
        """Of raw and the measured ones of `codecs`, the one in which a byte is here first: a codec below its break-even bandwidth, where a
        byte that it saves takes longer to cross than to decode. Raw if the bandwidth is unknown.
        """
        known = ["raw", *(codec for codec in codecs if codec in self.codecs)]
        return min(known, key=lambda codec: self.fetched_s_per_byte(codec) or 0.0)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else (1 - _NEW_WEIGHT) * before + _NEW_WEIGHT * value
