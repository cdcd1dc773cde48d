"""A mode as data: what crosses, when, and in which codec. A row of config becomes a Policy; no code depends on a mode's name."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from semgap.codecs import CODECS, Codec, TopK, codec_named
from semgap.tensors import TensorClass

AUTO = "auto"
"""As `codec.kv`: the codec of each layer's blocks is chosen as they are saved (kv/codec_choice.py)."""

KV_CODECS = ("raw", "planes_zstd", "int8", "int4")
"""The codecs that `auto` may choose, in the order of preference: raw takes no time of a processor, int4 changes most. Every process has
them."""


class SamplingRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a token is drawn: `greedy`, or `sample` after temperature, then top_k (0: off), then top_p (1: off).

    ValueError (msgspec.ValidationError from config) names the field, the value and the way out.
    """

    kind: str = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("greedy", "sample"):
            raise ValueError(f"sampling kind {self.kind!r} is not known; use greedy or sample")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"sampling temperature is {self.temperature}; use a number above 0, or kind: greedy for none")
        if self.top_k < 0:
            raise ValueError(f"sampling top_k is {self.top_k}; use 1 or more, or 0 for the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling top_p is {self.top_p}; use a number above 0 and up to 1, which keeps every token")
        if self.kind == "greedy" and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("sampling kind greedy takes no temperature, top_k or top_p; leave them out, or use kind: sample")


class PolicyError(ValueError):
    """A mode contradicts itself; the message says why and the way out."""


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reply to each forward pass.

    logits_all: logits of every position sent; logits_last: of the last one; hidden_last: its final hidden state (the client applies
    the output head); topk: its `k` largest logits and the log-sum-exp of the rest; token: the token that the worker drew.
    """

    kind: Literal["logits_all", "logits_last", "hidden_last", "topk", "token"] = "logits_all"
    k: int | None = None


class CodecChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The codec of each tensor class. `kv` may be AUTO."""

    tokens: str = "raw"
    weights: str = "raw"
    kv: str = "raw"
    reply: str = "raw"

    def of(self, cls: TensorClass) -> str:
        """The codec's name for tensors of class `cls`."""
        names = {TensorClass.TOKENS: self.tokens, TensorClass.WEIGHTS: self.weights, TensorClass.KV: self.kv}
        return names.get(cls, self.reply)


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the worker's engine runs the requests of all sessions of a mode (engine/scheduler.py). Each field is one thing that it knows.

    `turns`: `whole` runs a request to its end before the next one begins, `steps` lets requests take turns.
    `merges`: which calls share a forward pass. nothing; alike: calls of one operation, and of equal lengths and positions; lengths: decodes
    of any positions, or prefills of any lengths; all: prefills, cut into chunks, beside decodes.
    `wait_ms`: how long a call waits for others like it, for a runtime that does not know how many requests are alive.
    `step_tokens`: the most tokens of a step; decodes come first, prefills are cut to the rest.
    `prefix`: KV blocks of equal beginnings are computed and kept once. `deadline`: the least slack comes first, late requests last.
    `max_requests`: requests that run at once; the others queue, at most `max_queue` of them.
    """

    turns: Literal["whole", "steps"] = "steps"
    merges: Literal["nothing", "alike", "lengths", "all"] = "nothing"
    wait_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0
    step_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 256
    prefix: bool = False
    deadline: bool = False
    max_requests: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    max_queue: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 1024


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mode; config/README.md explains each field. `max_steps` bounds the decode steps of a phase, for modes that take minutes.

    `recovery`, `shadow`, `replay` and `fallback` are about KV blocks under memory pressure (kv/recovery.py). `prefix`: how a request's
    beginning comes whose KV blocks a KV host keeps by content (kv/prefixes.py). `plant_us`: the worker
    waits so long before the compute of every step, an effect of known size in the gap. `batching`: the worker's engine runs the requests
    of all sessions; None: each session runs its own.
    """

    placement: Literal["local", "remote"] = "remote"
    weights: Literal["every_step", "once", "by_hash"] = "once"
    kv_cache: Literal["every_step", "resident", "offloaded"] = "resident"
    reply: Reply = Reply()
    codec: CodecChoice = CodecChoice()
    keeps: Literal["bitwise", "tokens", "lossy"] = "bitwise"
    window: int = 1
    coalesce: int = 1
    ahead: bool = False
    max_steps: int | None = None
    recovery: Literal["reload", "recompute", "delta", "auto"] = "reload"
    shadow: Literal["worker", "kvhost"] = "worker"
    replay: Literal["prefill", "exact"] | None = None
    fallback: bool = True
    prefix: Literal["recompute", "fetch_whole", "fetch_blocks", "auto"] = "recompute"
    plant_us: int = 0
    batching: Batching | None = None

    def codec_for(self, cls: TensorClass) -> str | Codec:
        """The codec of tensors of class `cls`; a topk reply has its own."""
        return TopK(self.reply.k) if self.reply.k and cls is TensorClass.LOGITS else self.codec.of(cls)

    @property
    def is_local(self) -> bool:
        return self.placement == "local"

    @property
    def is_stateless(self) -> bool:
        """True if the worker keeps nothing between steps."""
        return self.kv_cache == "every_step"

    @property
    def fetches_prefixes(self) -> bool:
        """True if the beginning of a request may come out of a KV host."""
        return self.prefix != "recompute"

    @property
    def kv_codecs(self) -> tuple[str, ...]:
        """The codecs in which blocks may be saved, the preferred one first. `keeps` bounds the choice of AUTO: exact ones, unless lossy."""
        if self.codec.kv != AUTO:
            return (self.codec.kv,)
        return tuple(name for name in KV_CODECS if self.keeps == "lossy" or codec_named(name).exact)

    @property
    def lossy_kv(self) -> str | None:
        """`codec.kv` if saved blocks may come back changed."""
        return None if all(codec_named(name).exact for name in self.kv_codecs) else self.codec.kv

    @property
    def replays_exactly(self) -> bool:
        """True if a recompute repeats the original shapes, and so the same bits; else it is one prefill."""
        return self.replay == "exact" or (self.replay is None and self.keeps == "bitwise")


def coded_by(policy: Policy, side: Literal["client", "worker"]) -> dict[str, str]:
    """The codec of each field whose payloads `side` encodes or decodes, AUTO left out; {} for local, which has no wire."""
    if policy.is_local:
        return {}
    fields = {"tokens", "weights"} | ({"reply"} if policy.reply.kind not in ("topk", "token") else set())
    shared = policy.prefix in ("fetch_blocks", "auto")
    blocks = policy.kv_cache == "resident" and (shared or policy.recovery in ("delta", "auto"))  # on the worker's side alone
    if policy.codec.kv != AUTO and (policy.is_stateless or (side == "worker" and blocks)):
        fields.add("kv")
    return {field: getattr(policy.codec, field) for field in sorted(fields)}


def refused_codec(policy: Policy, side: Literal["client", "worker"]) -> str | None:
    """Why this process cannot be `side` of the policy (a codec that it can neither encode nor decode), or None.

    Imports torch only for codecs that need a GPU.
    """
    for field, name in coded_by(policy, side).items():
        reason = codec_named(name).unavailable()
        if reason:
            return f"codec.{field} {name!r} cannot be encoded or decoded by the {side}: {reason}; or use codec planes_zstd"
    return None


def unrunnable(policy: Policy, mode: str, launch: str) -> str | None:
    """Why this machine cannot run the mode, or None. Checks the client's codecs, and the worker's if it starts here.

    A worker elsewhere checks its own.
    """
    sides: tuple[Literal["client", "worker"], ...] = ("client", "worker") if launch == "local" else ("client",)
    reason = next(filter(None, (refused_codec(policy, side) for side in sides)), None)
    return reason and f"mode {mode!r} cannot be run on this machine: {reason}"


def policy_from(row: dict, mode: str) -> Policy:
    """The Policy of a config row, checked as a whole. PolicyError names the mode, the field and the way out."""
    try:
        policy = msgspec.convert(row, Policy)
    except msgspec.ValidationError as error:
        raise PolicyError(f"mode {mode!r}: {error}") from error
    checks = (_codec_faults, _reply_faults, _window_faults, _recovery_faults, _batching_faults, _other_faults)
    fault = next((fault for check in checks for fault in check(policy)), None)
    if fault:
        raise PolicyError(f"mode {mode!r}: {fault}")
    return policy


def _other_faults(policy: Policy) -> Iterator[str]:
    if policy.weights == "every_step" and not policy.is_stateless:
        yield f"weights every_step leaves no model for a {policy.kv_cache} cache; use kv_cache: every_step"
    if policy.max_steps is not None and policy.max_steps < 1:
        yield f"max_steps is {policy.max_steps}; it must be 1 or more"
    if policy.plant_us < 0:
        yield f"plant_us is {policy.plant_us}; it must be 0 or more"
    if policy.plant_us and policy.is_local:
        yield f"plant_us {policy.plant_us} with placement local; a worker plants it, use placement: remote"


def _batching_faults(policy: Policy) -> Iterator[str]:
    batching = policy.batching
    if batching is None:
        return
    if policy.is_local or policy.weights == "every_step" or policy.kv_cache != "resident":
        where = "placement local" if policy.is_local else f"weights {policy.weights}, kv_cache {policy.kv_cache}"
        yield f"batching with {where}; the engine keeps both, use placement: remote, weights: once or by_hash, kv_cache: resident"
    if policy.reply.kind != "token":
        yield f"batching with reply.kind {policy.reply.kind!r}; the engine draws the tokens, use reply: {{kind: token}}"
    if policy.keeps == "lossy":
        yield "batching with keeps: lossy, whose steps are fed the reference's tokens; the engine feeds its own, use keeps: tokens"
    if policy.coalesce > 1 or policy.ahead:
        yield "batching with coalesce or ahead; a step of the engine is one frame, leave them out"
    if policy.plant_us or policy.shadow == "kvhost" or policy.recovery != "reload":
        yield "batching with plant_us, shadow or recovery; the engine has neither, leave them out"
    if batching.turns == "whole" and batching.merges != "nothing":
        yield f"turns: whole with merges: {batching.merges}; requests that run one after the other merge nothing"
    if batching.wait_ms and batching.merges != "alike":
        yield f"wait_ms {batching.wait_ms:g} with merges: {batching.merges}; only merges: alike waits for calls"
    if batching.prefix and batching.merges != "all":
        yield f"prefix with merges: {batching.merges}; use merges: all"


def _reply_faults(policy: Policy) -> Iterator[str]:
    kind, k = policy.reply.kind, policy.reply.k
    if (kind == "topk") != (k is not None):
        missing = "reply.kind topk lacks reply.k; say how many logits it sends, e.g. k: 50"
        yield missing if k is None else f"reply.k is {k} with reply.kind {kind!r}; k goes with kind topk alone"
    if k is not None and k < 1:
        yield f"reply.k is {k}; it must be 1 or more"
    if kind == "topk" and policy.keeps != "lossy":
        yield f"it promises keeps: {policy.keeps}, but topk drops logits; say keeps: lossy"
    if kind == "token" and policy.keeps == "bitwise":
        yield "it promises keeps: bitwise, but the client sees no logits of a token reply; say keeps: tokens"
    if kind in ("topk", "token") and policy.codec.reply != "raw":
        yield f"codec.reply {policy.codec.reply!r} with reply.kind {kind!r}, which has a form of its own; use raw"
    if policy.codec.reply == "topk":
        yield "codec.reply 'topk' needs its k; use reply: {kind: topk, k: ...}"
    if kind == "token" and policy.is_stateless:
        yield "reply.kind token needs a cache that stays; use kv_cache: resident or offloaded"
    if policy.is_local and kind not in ("logits_all", "logits_last"):
        yield f"placement local with reply.kind {kind!r}; use logits_last"


def _window_faults(policy: Policy) -> Iterator[str]:
    window, coalesce = policy.window, policy.coalesce
    if window < 1 or not 1 <= coalesce <= window:
        yield f"window {window}, coalesce {coalesce}; 1 <= coalesce <= window is needed"
    if window > 1 and policy.reply.kind != "token":
        yield f"window {window} needs reply.kind token, since {policy.reply.kind} leaves the draw to the client"
    if policy.ahead and window < 2:
        yield f"ahead with window {window}; only a window can be requested before the last one ends"
    if policy.ahead and coalesce == window:
        yield (
            f"ahead with coalesce {coalesce} of window {window}: the next window is requested at the first frame of the last one, which "
            "holds all of it; use a smaller coalesce"
        )
    if window > 1 and policy.keeps == "lossy":
        yield f"keeps lossy with window {window}; its steps are fed the reference's tokens one by one, use window: 1"


def _recovery_faults(policy: Policy) -> Iterator[str]:
    if policy.shadow == "kvhost" and (policy.is_local or policy.kv_cache != "resident"):
        where = "local" if policy.is_local else f"kv_cache {policy.kv_cache}"
        yield f"shadow kvhost with {where}; it keeps blocks of a resident cache, use kv_cache: resident"
    if policy.shadow == "kvhost" and policy.recovery == "recompute":
        yield "shadow kvhost with recovery recompute, which saves no blocks; leave shadow out"
    if policy.fetches_prefixes and policy.shadow != "kvhost":
        yield f"prefix {policy.prefix} with shadow {policy.shadow}; a KV host alone keeps blocks by content, use shadow: kvhost"
    if policy.fetches_prefixes and policy.reply.kind == "logits_all":
        yield f"prefix {policy.prefix} with reply.kind logits_all; a fetched prefix has no logits, use logits_last, hidden_last or token"
    if policy.keeps == "bitwise" and policy.replay == "prefill":
        yield "it promises keeps: bitwise, but replay: prefill gives other last bits; say keeps: tokens, or replay: exact"


def _codec_faults(policy: Policy) -> Iterator[str]:
    replied = TensorClass.HIDDEN if policy.reply.kind == "hidden_last" else TensorClass.LOGITS
    crossing = {TensorClass.TOKENS: "tokens", TensorClass.WEIGHTS: "weights", TensorClass.KV: "kv", replied: "reply"}
    inexact = []
    for cls, field in crossing.items():
        name = policy.codec.of(cls)
        if field == "kv" and name == AUTO:
            yield from auto_faults(policy)
            continue
        if name not in CODECS:
            yield f"codec.{field} {name!r} is not known; use one of {', '.join(CODECS)}"
        codec: Codec = codec_named(name)
        if cls not in codec.accepts:
            others = ", ".join(other for other, each in CODECS.items() if cls in each.accepts)
            yield f"codec {name!r} does not accept {field}; use one of {others}"
        if not codec.exact and cls is not TensorClass.TOKENS:
            inexact.append(f"{field} {name}")
    if inexact and policy.keeps != "lossy":
        yield f"it promises keeps: {policy.keeps}, but loses in {', '.join(inexact)}; say keeps: lossy"


def auto_faults(policy: Policy) -> Iterator[str]:
    """Why no codec of KV blocks can be chosen in a policy with AUTO: none of them is saved by itself."""
    by_blocks = policy.recovery in ("delta", "auto") or policy.prefix in ("fetch_blocks", "auto")
    if policy.is_local or policy.kv_cache != "resident" or not by_blocks:
        where = "placement local" if policy.is_local else f"kv_cache {policy.kv_cache}, recovery {policy.recovery}, prefix {policy.prefix}"
        yield (
            f"codec.kv 'auto' with {where}; it chooses the codec of blocks of a resident cache that move one by one: use recovery: delta "
            f"or auto, or prefix: fetch_blocks or auto, or name a codec, e.g. {', '.join(KV_CODECS)}"
        )


class SessionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's request for a session. `model` is the Hugging Face config, without weights; None: a session for pings only.

    `model_id` distinguishes models in a KV host, `salt` tenants: only sessions with the same one share blocks by content. `handles` caches
    fit the KV pool times `kv_budget`, a fraction of them.
    """

    policy: Policy = Policy()
    model: dict | None = None
    dtype: str = "float32"
    executor: str = "auto"
    max_length: int = 0
    sampling: SamplingRule = SamplingRule()
    seed: int = 0
    stop_tokens: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)], ...] = ()
    congestion: str | None = None
    model_id: str = ""
    salt: str = ""
    handles: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    kv_budget: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
