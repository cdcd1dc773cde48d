"""A mode is data: what crosses, when, and in which codec. A row of config becomes a Policy; nothing else knows a mode's name."""

from __future__ import annotations

from typing import Literal

import msgspec

from semgap.codecs import CODECS, Codec, codec_named
from semgap.tensors import TensorClass


class PolicyError(ValueError):
    """A mode that cannot be what it says; the message says why and what would do."""


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What comes back from each forward pass. logits_all: the logits of every position that went up."""

    kind: Literal["logits_all"] = "logits_all"


class CodecChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The codec of each tensor class."""

    tokens: str = "raw"
    weights: str = "raw"
    kv: str = "raw"
    reply: str = "raw"

    def of(self, cls: TensorClass) -> str:
        """The codec's name for tensors of class `cls`."""
        names = {TensorClass.TOKENS: self.tokens, TensorClass.WEIGHTS: self.weights, TensorClass.KV: self.kv}
        return names.get(cls, self.reply)


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mode. Field by field in config/README.md; `max_steps` bounds the decode steps of a phase, for modes that take minutes."""

    placement: Literal["local", "remote"] = "remote"
    weights: Literal["every_step", "once"] = "once"
    kv_cache: Literal["every_step", "resident", "offloaded"] = "resident"
    reply: Reply = Reply()
    codec: CodecChoice = CodecChoice()
    keeps: Literal["bitwise", "tokens", "lossy"] = "bitwise"
    max_steps: int | None = None

    @property
    def is_local(self) -> bool:
        return self.placement == "local"

    @property
    def is_stateless(self) -> bool:
        """The worker keeps nothing between two steps."""
        return self.kv_cache == "every_step"


def policy_from(row: dict, mode: str) -> Policy:
    """The Policy of a config row, checked as a whole. PolicyError names the mode, the field and the way out."""
    try:
        policy = msgspec.convert(row, Policy)
    except msgspec.ValidationError as error:
        raise PolicyError(f"mode {mode!r}: {error}") from error
    _check_codecs(policy, mode)
    if policy.weights == "every_step" and not policy.is_stateless:
        raise PolicyError(f"mode {mode!r}: weights every_step leaves no model for a {policy.kv_cache} cache; use kv_cache: every_step")
    if policy.max_steps is not None and policy.max_steps < 1:
        raise PolicyError(f"mode {mode!r}: max_steps is {policy.max_steps}; it must be 1 or more")
    return policy


def _check_codecs(policy: Policy, mode: str) -> None:
    crossing = {TensorClass.TOKENS: "tokens", TensorClass.WEIGHTS: "weights", TensorClass.KV: "kv", TensorClass.LOGITS: "reply"}
    inexact = []
    for cls, field in crossing.items():
        name = policy.codec.of(cls)
        if name not in CODECS:
            raise PolicyError(f"mode {mode!r}: codec.{field} {name!r} is not known; use one of {', '.join(CODECS)}")
        codec: Codec = codec_named(name)
        if cls not in codec.accepts:
            raise PolicyError(f"mode {mode!r}: codec {name!r} does not accept {field}")
        if not codec.exact and cls is not TensorClass.TOKENS:
            inexact.append(f"{field} {name}")
    if inexact and policy.keeps != "lossy":
        raise PolicyError(f"mode {mode!r} promises keeps: {policy.keeps}, but loses in {', '.join(inexact)}; say keeps: lossy")


class SessionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client asks of a worker for one session. `model` is the Hugging Face config, without weights; None asks only to ping."""

    policy: Policy = Policy()
    model: dict | None = None
    dtype: str = "float32"
    max_length: int = 0
    congestion: str | None = None
