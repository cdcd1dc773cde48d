"""The control on a worker: it decodes over a copy of a handle, and leaves the handle as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from semgap.client.remote_runtime import RemoteRuntime
from semgap.policy import CodecChoice, Policy, Reply
from semgap.wire import messages
from semgap.wire.link import RemoteError
from semgap.wire.messages import Kind, Operation

PROMPT = np.arange(3, 13)


def _alone(runtime: RemoteRuntime, position: int, token: int, count: int) -> messages.DecodedAlone:
    header = messages.DecodeAlone((), runtime.handle, position, token, count)
    answer = runtime.link.request(Operation.DECODE_ALONE, header).header
    assert isinstance(answer, messages.DecodedAlone)
    return answer


def _decoded(runtime: RemoteRuntime, token: int, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        for arrival in runtime.decode(tokens[-1] if tokens else token, count - len(tokens), Kind.REGULAR):
            tokens += arrival.tokens
    return tokens


@pytest.mark.parametrize(
    "policy",
    [Policy(), Policy(kv_cache="offloaded"), Policy(reply=Reply("token"), codec=CodecChoice(tokens="compact"), window=6, keeps="tokens")],
    ids=["resident", "offloaded", "window"],
)
def test_the_worker_alone_draws_what_the_mode_draws_before_and_after_it(
    worker: object, llama: Path, open_runtime: Callable[..., RemoteRuntime], policy: Policy
) -> None:
    runtime = open_runtime(worker, llama, policy, control=True)
    first = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    before = _alone(runtime, len(PROMPT), first, 6)
    assert len(before.took_ns) == 6 and all(took > 0 for took in before.took_ns)
    tokens = _decoded(runtime, first, 6)
    assert list(before.drawn) == tokens
    assert _alone(runtime, len(PROMPT) + 2, tokens[1], 4).drawn == tuple(tokens[2:])  # positions that the handle has passed
    assert _alone(runtime, len(PROMPT) + 6, tokens[5], 2).drawn == tuple(_decoded(runtime, tokens[5], 2))


def test_what_a_handle_does_not_hold_or_the_pool_has_no_room_for_is_refused(
    worker: object, llama: Path, open_runtime: Callable[..., RemoteRuntime]
) -> None:
    roomless = open_runtime(worker, llama, Policy())
    token = roomless.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    with pytest.raises(RemoteError, match="raise kv_budget"):
        _alone(roomless, len(PROMPT), token, 2)
    runtime = open_runtime(worker, llama, Policy(), control=True)
    token = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    with pytest.raises(RemoteError, match="holds 10 positions, the client says 11"):
        _alone(runtime, len(PROMPT) + 1, token, 2)
    with pytest.raises(RemoteError, match="max_length"):
        _alone(runtime, len(PROMPT), token, 40)
    assert _decoded(runtime, token, 2)


def test_a_window_needs_a_session_whose_worker_replies_tokens(
    worker: object, llama: Path, open_runtime: Callable[..., RemoteRuntime]
) -> None:
    runtime = open_runtime(worker, llama, Policy())
    token = runtime.prefill(PROMPT, 0, Kind.SETUP).tokens[0]
    runtime.link.post(Operation.DECODE_WINDOW, messages.DecodeWindow((), runtime.handle, len(PROMPT), token))
    with pytest.raises(RemoteError, match="needs reply"):
        runtime.link.await_reply(Operation.DECODE_WINDOW)
