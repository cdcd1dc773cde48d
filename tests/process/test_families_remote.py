"""Every family of models over the wire: local's logits to the bit, by the worker's head or the client's, while KV blocks come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from semgap.client.head import load_client_head
from semgap.client.local_runtime import LocalRuntime
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Arrival, Drawing
from semgap.engine.architecture import FAMILIES
from semgap.engine.decoder_weights import COMPILED
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.policy import CodecChoice, Policy, Reply
from semgap.wire.messages import Kind
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import StartedWorker

KIN = [family for family in FAMILIES if family not in ("llama", "gptj", "gpt2")]  # other files run these three
PROMPT = np.arange(3, 70) % 512  # more than a block
STEPS = 4
ROWS = Policy(recovery="reload", shadow="worker")
HIDDEN = Policy(reply=Reply("hidden_last"), recovery="delta", shadow="worker", codec=CodecChoice(kv="planes_zstd"))


@pytest.fixture(scope="module")
def preloaded(start_once: Callable[..., StartedWorker]) -> StartedWorker:
    """A worker that has loaded transformers, so that its sessions need not."""
    return start_once("--executor", "eager")


@pytest.mark.parametrize(
    ("family", "policy"),
    [*((family, HIDDEN) for family in KIN), ("qwen3", ROWS), ("granite", ROWS)],
    ids=lambda value: getattr(value, "recovery", value),
)
def test_a_family_over_the_wire_gives_bitwise_locals_logits(
    preloaded: StartedWorker, model_of: Callable[..., Path], open_runtime: Callable[..., RemoteRuntime], family: str, policy: Policy
) -> None:
    model = ModelFiles(model_of(family), load_digest(model_of(family)))
    local = LocalRuntime(Policy(placement="local"), model, Drawing(), threads=1, max_length=90, device="cpu", setup={})
    assert local.executor_kind == ("fused" if family in COMPILED else "eager")
    head = load_client_head(model, local.executor_kind, 1) if policy.reply.kind == "hidden_last" else None
    remote = open_runtime(preloaded, model.directory, policy, head=head, max_length=90, model_id=model.digest.sha256)
    ours, theirs = remote.prefill(PROMPT, 0, Kind.SETUP), local.prefill(PROMPT, 0, Kind.SETUP)
    assert np.array_equal(_last(ours), _last(theirs))
    for step in range(STEPS):
        remote.evict([step % 2] if step else [0, 1])
        (ours,), (theirs,) = (runtime.decode(theirs.tokens[0], 1, Kind.REGULAR) for runtime in (remote, local))
        assert np.array_equal(_last(ours), _last(theirs)), step
    assert {step["recovered"]["how"] for step in reconcile(remote.link)["peer"]["steps"][1:]} == {policy.recovery}


def _last(arrival: Arrival) -> np.ndarray:
    assert arrival.logits is not None
    row: np.ndarray = arrival.logits.as_float32()[-1]
    return row
