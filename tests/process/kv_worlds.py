"""Two workers, each behind a link of its own to one KV host, in which tests break one thing after the other and look at what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from links_to_kv_hosts import LinkToKVHost, relay_over
from started_workers import KVCluster

from semgap import codecs
from semgap.client.local_runtime import LocalRuntime
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.kv import prefix_names
from semgap.kv.host import connect_kv
from semgap.kv.pool import BLOCK
from semgap.policy import CodecChoice, Policy, Reply
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages
from semgap.wire.frames import WireError
from semgap.wire.link import Link
from semgap.wire.messages import Kind, Operation
from semgap.wire.reconcile import reconcile

if TYPE_CHECKING:
    from started_workers import StartedWorker

LENGTH = 320
SESSIONS = 64  # of a worker at most


def policy(prefix: str = "recompute", recovery: str = "delta", **more: Any) -> Policy:
    """One with a KV host, raw blocks, and the last row of logits as the reply."""
    kv = CodecChoice(kv=more.pop("kv", "raw"))
    chosen: dict[str, Any] = {"weights": "by_hash", "reply": Reply("logits_last"), "shadow": "kvhost", "codec": kv}
    return Policy(**chosen | {"prefix": prefix, "recovery": recovery} | more)


def rows_alone(model: Path, prompt: np.ndarray, steps: int) -> list[np.ndarray]:
    """The last row of logits of a prefill and of each step after it where nothing ever moved."""
    local = Policy(placement="local", reply=Reply("logits_last"))
    files = ModelFiles(model, load_digest(model))
    runtime = LocalRuntime(local, files, Drawing(), threads=1, max_length=LENGTH, device="cpu", setup={})
    arrival = runtime.prefill(prompt, 0, Kind.SETUP)
    rows = [row_of(arrival)]
    for _ in range(steps):
        (arrival,) = runtime.decode(arrival.tokens[0], 1, Kind.SETUP)
        rows.append(row_of(arrival))
    return rows


def row_of(arrival: Any) -> np.ndarray:
    row: np.ndarray = arrival.logits.as_float32()[-1].copy()
    return row


def recovered(runtime: RemoteRuntime) -> dict[str, Any]:
    """The worker's record of the last step."""
    record: dict[str, Any] = reconcile(runtime.link)["peer"]["steps"][-1]["recovered"]
    return record


def put_under_names(link: Link, model: Path, salt: str, prompt: np.ndarray, first: int, other: np.ndarray) -> int:
    """Puts blocks of `other` under the names of the prompt's whole blocks, from the block `first` on. Gives how many."""
    digest = load_digest(model)
    files = ModelFiles(model, digest)
    shape = files.architecture.kv_shape(LENGTH)
    name = prefix_names.model_name(digest.sha256, files.config, "raw")
    layout = messages.KVLayout(name, DType.F32, shape.layers, shape.heads, shape.head_dim, BLOCK, BLOCK)
    space = prefix_names.space_of(layout, salt, "fused on cpu")
    names, garbage = prefix_names.chain_of(space, prompt, BLOCK), np.ones((1, 2, shape.heads, BLOCK, shape.head_dim), np.float32)
    before = 0
    if first:
        find = messages.FindPrefix((), space, layout, names[:first])
        before = link.request(Operation.FIND_PREFIX, find, [token_ids(prompt[: BLOCK * first])]).header_as(messages.PrefixFound).last
        assert before
    for number in range(first, len(names)):
        tensors = [token_ids(other[BLOCK * number : BLOCK * (number + 1)]), *[_encoded(garbage, TensorClass.KV)] * shape.layers]
        put = messages.PutPrefixBlock((), space, layout, names[number], before)
        before = link.request(Operation.PUT_PREFIX_BLOCK, put, tensors).header_as(messages.PrefixBlockPut).number
        assert before
    return len(names) - first


def token_ids(tokens: np.ndarray) -> codecs.Encoded:
    """Tokens (n,) as they cross to a KV host."""
    return _encoded(tokens.astype(np.uint32), TensorClass.CONTROL)


def _encoded(values: np.ndarray, of: TensorClass) -> codecs.Encoded:
    return codecs.encode(Tensor.from_numpy(values, of), "raw")


@dataclass
class World:
    """`first` and `second` reach the KV host through `near` and `far`. Temporary files of all processes lie in `temporary`."""

    cluster: KVCluster
    model: Path
    temporary: Path
    near: LinkToKVHost
    far: LinkToKVHost
    host: StartedWorker
    first: StartedWorker
    second: StartedWorker
    opened: list[tuple[RemoteRuntime, int]] = field(default_factory=list)
    open_runtime: Callable[..., RemoteRuntime] | None = None
    wait_until: Callable[..., None] | None = None
    threads: int = 0  # of the idle KV host

    @classmethod
    @contextlib.contextmanager
    def started(cls, model: Path, directory: Path) -> Iterator[World]:
        """With all processes up."""
        temporary, near, far = directory / "temporary", LinkToKVHost(), LinkToKVHost()
        temporary.mkdir()
        with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(temporary))
            cluster = KVCluster(directory, stack)
            with socket.create_server(("127.0.0.1", 0)) as free:
                address = f"127.0.0.1:{free.getsockname()[1]}"
            host = cluster.host("--listen", address)
            workers = [
                cluster.worker(stack.enter_context(relay_over(address, path)), "--max-sessions", str(SESSIONS)) for path in (near, far)
            ]
            world = cls(cluster, model, temporary, near, far, host, *workers)
            world.threads = world._host_threads()
            yield world

    def open(self, worker: StartedWorker, chosen: Policy, **more: Any) -> RemoteRuntime:
        """A session with a worker; `require_nothing_left` closes it."""
        assert self.open_runtime is not None
        before = {child.pid for child in worker.sessions()}
        known = {"max_length": LENGTH, "model_id": load_digest(self.model).sha256}
        runtime = self.open_runtime(worker, more.pop("model", self.model), chosen, **known | more)
        (pid,) = {child.pid for child in worker.sessions()} - before
        self.opened.append((runtime, pid))
        return runtime

    def kill(self, runtime: RemoteRuntime) -> None:
        """Ends a session's process, as it is."""
        os.kill(next(pid for each, pid in self.opened if each is runtime), signal.SIGKILL)

    def kill_host(self) -> None:
        os.kill(self.host.process.pid, signal.SIGKILL)
        self.host.process.wait()

    def revive_host(self) -> None:
        self.host = self.cluster.host("--listen", self.host.address)

    @contextlib.contextmanager
    def small_host(self, budget_bytes: int) -> Iterator[None]:
        """For both workers' new sessions, another KV host of the same cluster takes the place of the usual one."""
        usual, self.host = self.host, self.cluster.host(budget_bytes=budget_bytes)
        self.near.to = self.far.to = self.host.address
        try:
            yield
        finally:
            self.close()
            self.host.process.kill()
            self.host, self.near.to, self.far.to = usual, "", ""

    def link(self) -> Link:
        """One's own link to the KV host."""
        return connect_kv(self.host.address, self.host.secret, 10.0)

    def used_bytes(self) -> int:
        used: int = self._counts()["used_bytes"]
        return used

    def close(self) -> None:
        """Closes all sessions, and has the links as they were."""
        for path in (self.near, self.far):
            path.meanwhile, path.piece_bytes, path.delay_s = None, LinkToKVHost.piece_bytes, LinkToKVHost.delay_s
        for runtime, _ in self.opened:
            with contextlib.suppress(WireError, OSError):
                runtime.link.close()
        self.opened.clear()

    def require_nothing_left(self, used_bytes: int) -> None:
        """Closes all sessions. No process of theirs is left, no thread, handle, block or hold of theirs in the KV host, no file."""
        assert self.wait_until is not None
        wait_until = self.wait_until
        pids = [pid for _, pid in self.opened]
        self.close()
        wait_until(lambda: not self.first.sessions() and not self.second.sessions(), "all sessions end")
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the workers reap them")
        wait_until(lambda: self._host_threads() == self.threads, "the KV host's connections end")
        wait_until(lambda: self._counts()["held_bytes"] == 0, "the KV host holds nothing for anybody")
        wait_until(lambda: self.used_bytes() == used_bytes, f"the KV host keeps {used_bytes} bytes, now {self.used_bytes()}")
        assert list(self.temporary.iterdir()) == []

    def _host_threads(self) -> int:
        return psutil.Process(self.host.process.pid).num_threads()

    def _counts(self) -> dict[str, Any]:
        link = self.link()
        try:
            counts: dict[str, Any] = reconcile(link, "KV host")["peer"]
            return counts
        finally:
            link.close()
