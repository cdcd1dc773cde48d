"""Bounds of the numbers that a client names for its session. A session beyond one is refused when it is requested."""

from collections.abc import Iterator

from semgap.codecs import CODECS, codec_named
from semgap.policy import AUTO, SessionSpec, auto_faults
from semgap.tensors import TensorClass
from semgap.wire.link import Refused
from semgap.wire.messages import MODEL_ID_CHARS, SALT_CHARS

OPEN_HANDLES = 64
"""A session may hold so many handles open, or as many as it asked for."""

_MOST_HANDLES = 256
_MOST_PLANT_US = 10_000_000


def require_bounds(spec: SessionSpec) -> None:
    """Refused for a session that no worker can serve, or that would hold its process up."""
    fault = next(_faults(spec), None)
    if fault:
        raise Refused("session", fault)
    unknown = next(_codec_faults(spec), None)
    if unknown:
        raise Refused("codec", unknown)


def _faults(spec: SessionSpec) -> Iterator[str]:
    policy = spec.policy
    if spec.max_length < 0 or (spec.model is not None and not spec.max_length):
        yield f"max_length is {spec.max_length}; a session with a model needs 1 or more"
    if len(spec.model_id) > MODEL_ID_CHARS:
        yield f"a model_id of {len(spec.model_id)} characters; use at most {MODEL_ID_CHARS}, e.g. a digest"
    if len(spec.salt) > SALT_CHARS:
        yield f"a salt of {len(spec.salt)} characters; use at most {SALT_CHARS}, e.g. 32 random hexadecimal digits"
    if policy.batching is None and spec.handles > _MOST_HANDLES:
        yield f"a session of {spec.handles} handles; without batching it has at most {_MOST_HANDLES}"
    if not 0 <= policy.plant_us <= _MOST_PLANT_US:
        yield f"plant_us is {policy.plant_us}; use 0 to {_MOST_PLANT_US}"
    if policy.window < 1 or policy.coalesce < 1:
        yield f"window {policy.window}, coalesce {policy.coalesce}; each must be 1 or more"
    if policy.reply.kind == "topk" and (policy.reply.k is None or policy.reply.k < 1):
        yield f"reply.k is {policy.reply.k} with reply.kind topk; it must be 1 or more"


def _codec_faults(spec: SessionSpec) -> Iterator[str]:
    replied = TensorClass.HIDDEN if spec.policy.reply.kind == "hidden_last" else TensorClass.LOGITS
    for cls in (TensorClass.TOKENS, TensorClass.WEIGHTS, TensorClass.KV, replied):
        name = spec.policy.codec.of(cls)
        if cls is TensorClass.KV and name == AUTO:
            yield from auto_faults(spec.policy)
        elif name not in CODECS or cls not in codec_named(name).accepts:
            yield f"codec {name!r} is not one for {cls.name.lower()}"
