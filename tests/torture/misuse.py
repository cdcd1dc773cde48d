"""What clients with the secret may do wrong on purpose, in many sessions at once and in any order."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import test_misuse
import xxhash

from semgap import codecs
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.kv.host import connect_kv
from semgap.policy import Batching, Policy, Reply, SessionSpec
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.frames import Limits, WireError
from semgap.wire.handshake import AuthError, shake_hands_as_client
from semgap.wire.link import Link, RemoteError, connect, control
from semgap.wire.messages import Kind, Operation
from semgap.wire.tcp import Timeouts
from torture.campaign import Book, Try
from torture.mutated_frames import WITNESS, blocks_come_back, wrong_tokens
from torture.recording import PROMPT, expected_tokens, opened, run_session, session_of, tiny_model
from torture.servers import MOST_CONNECTIONS, Servers

_EACH, _SHORT = 20, 1
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_BATCHES = 6
_NUMBERS = (0, -1, 1, 3, 7, 10**6, 10**9, 1 << 40, "x", None, 1.5, [], {})


def attack(book: Book, place: Path, short: bool) -> None:
    """Each try: one way of misuse, with a seed of its own, then the next client."""
    model = tiny_model(place / "model")
    with Servers.started(place, model, tls=True) as servers:
        servers.tokens = expected_tokens(model)
        for one in book.turns(dict.fromkeys(WAYS, _SHORT if short else _EACH)):
            try:
                outcome, faults = WAYS[one.target](servers, one.rng)
            except (WireError, OSError) as error:
                outcome, faults = "refused", [f"it was not refused by name: {type(error).__name__}: {error}"]
            faults += [fault for target in MOST_CONNECTIONS for fault in servers.faults(target)]
            book.judged(one, outcome, [*faults, *_next_client(servers, one)])


def _next_client(servers: Servers, one: Try) -> Iterator[str]:
    deadline = time.monotonic() + 30
    while True:
        try:
            for target in ("worker", "relay"):
                yield from wrong_tokens(run_session(servers.address(target), servers.secret, WITNESS, servers.model), servers.tokens)
            yield from blocks_come_back(servers.address("KV host"), servers.secret, one.rng)
            return
        except RemoteError as error:
            if error.code != "busy" or time.monotonic() > deadline:  # sessions of the try are still ending
                yield f"the next client failed: {error.code}: {error}"
                return
            time.sleep(0.1)
        except (WireError, OSError) as error:
            yield f"the next client failed: {type(error).__name__}: {error}"
            return


def refused(act: Callable[[], Any], codes: tuple[str, ...] = (), must: bool = False) -> tuple[str, list[str]]:
    """The outcome of something that may be refused by a code, never by `internal`; with `must`, it is a fault if it is not refused."""
    try:
        act()
    except RemoteError as error:
        wrong = error.code == "internal" or (codes and error.code not in codes)
        return "refused", [f"it was refused as {error.code}: {error}"] if wrong else []
    return "survived", ["it was taken, and must be refused"] if must else []


def _runtime(servers: Servers, policy: Policy, **more: Any) -> RemoteRuntime:
    spec = msgspec.structs.replace(session_of(policy, servers.model), **more)
    link = opened(servers.address("worker"), servers.secret, spec)
    runtime = RemoteRuntime(link, policy, ModelFiles(servers.model, load_digest(servers.model)), Drawing())
    runtime.upload_weights()
    return runtime


def _uploads(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Weights by hash, of many models, which the worker should keep for later."""
    link = opened(servers.address("worker"), servers.secret, test_misuse.tiny_session(policy=Policy(weights="by_hash")))
    with contextlib.closing(link):
        for _ in range(rng.randint(1, 100)):
            test_misuse.upload_tiny(link, rng.random())
    return "survived", []


def _sessions_out_of_bounds(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """A session's fields of any value and type."""
    spec = msgspec.to_builtins(session_of(Policy(), servers.model))
    parts = (spec, spec["policy"], spec["policy"]["reply"], spec["policy"]["codec"], spec["sampling"])
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([each for each in parts if each])
        at[rng.choice(list(at))] = rng.choice((*_NUMBERS, "raw", "topk", True))
    link = connect(servers.address("worker"), Timeouts(20.0, 20.0))
    with contextlib.closing(link):
        return refused(lambda: shake_hands_as_client(link, servers.secret, spec))


def _models(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Model configs of odd shapes, and weights that are not theirs."""
    config = dict(test_misuse.TINY)
    for _ in range(rng.randint(1, 3)):
        config[rng.choice((*_KEYS, "model_type", "num_labels", "rope_scaling", "rope_theta", "head_dim"))] = rng.choice(_NUMBERS)

    def act() -> None:
        link = opened(servers.address("worker"), servers.secret, SessionSpec(policy=Policy(), model=config, max_length=8))
        with contextlib.closing(link):
            test_misuse.upload_tiny(link, 0.5)

    return refused(act)


def _handles(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Requests that never end."""
    runtime = _runtime(servers, Policy(), handles=rng.choice((1, 2, 64)))
    with contextlib.closing(runtime.link):
        return refused(
            lambda: [runtime.prefill(PROMPT[: rng.randint(1, 67)], request, Kind.SETUP) for request in range(300)], ("handle",), must=True
        )


def _any_order(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Requests of a session in any order, with any handle."""
    policy = Policy(reply=Reply("logits_last"), recovery=rng.choice(("reload", "delta", "auto")), shadow=rng.choice(("worker", "kvhost")))
    runtime = _runtime(servers, policy, handles=4)
    headers: dict[Operation, Callable[[int], messages.Header]] = {
        Operation.RELEASE: lambda handle: messages.Release((), handle),
        Operation.EVICT: lambda handle: messages.Evict((), handle, tuple(rng.randrange(3) for _ in range(rng.randint(0, 3)))),
        Operation.RESTORE: lambda handle: messages.Restore((), handle),
        Operation.FLUSH: lambda handle: messages.Flush((), handle),
        Operation.DECODE_ALONE: lambda handle: messages.DecodeAlone((), handle, rng.randint(0, 80), rng.randint(0, 600), rng.randint(1, 9)),
        Operation.PING_KV_HOST: lambda _: messages.PingKVHost((), rng.randint(0, 1 << 16), rng.randint(0, 1 << 16)),
        Operation.GET_BATCHES: lambda _: messages.Header(),
    }
    outcome, faults = "survived", []
    with contextlib.closing(runtime.link):
        for step in range(60):
            if rng.random() < 0.2:
                found = refused(lambda step=step: runtime.prefill(PROMPT[: rng.randint(1, 67)], step, Kind.SETUP))
            else:
                operation = rng.choice(list(headers))
                found = refused(lambda op=operation: runtime.link.request(op, headers[op](rng.randint(0, 6))))
            outcome, faults = "refused" if found[0] == "refused" else outcome, faults + found[1]
    return outcome, faults


def _engines(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Calls of any numbers to an engine."""
    policy = Policy(weights="by_hash", reply=Reply("token"), keeps="tokens", batching=Batching(merges="all", step_tokens=32))
    runtime = _runtime(servers, policy, handles=4)
    with contextlib.closing(runtime.link) as link:
        calls, fed = [], 0
        for _ in range(rng.randint(1, 5)):
            tokens = rng.choice((0, 1, 5, 67))
            fed += tokens
            position, draws, most = rng.choice((0, 0, 1, 66, 1 << 40)), rng.choice((0, 1, 8, 4096)), rng.choice((0, 96, 128, 4096))
            calls.append(messages.Call(rng.randint(0, 3), position, tokens, draws, rng.random() < 0.3, most))
        ids = np.array([rng.randrange(600) for _ in range(fed)], np.uint16)
        tensors = [codecs.encode(Tensor.from_numpy(ids, TensorClass.TOKENS), "raw")] if fed else []
        link.post(Operation.ADVANCE, messages.Advance((), tuple(calls)), tensors)
        return refused(lambda: link.receive_any(Operation.ADVANCE))


def _silence(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """More connections than a server takes, which say nothing or a part of a frame, and beyond them noise: who is too many is told so."""
    target = rng.choice(list(MOST_CONNECTIONS))
    address, patience = servers.address(target), Timeouts(5.0, 5.0)
    with contextlib.ExitStack() as stack:

        def opened_one() -> Link:
            link = connect(address, patience)
            stack.callback(link.close)
            return link

        for _ in range(MOST_CONNECTIONS[target]):
            with contextlib.suppress(OSError):  # sessions of a try before may still be ending
                opened_one().sock.sendall(rng.choice((b"", b"Sg", rng.randbytes(20))))
        told: Counter[str] = Counter()
        for _ in range(
            _BATCHES
        ):  # where opening them takes long, a silent one has lost its place to one of these, and this one to the next
            told.update([_last_word(link) for link in [opened_one() for _ in range(rng.randint(2, 8))]])
            if told["busy"]:
                break
        with contextlib.suppress(OSError):  # it may be turned away sooner
            for _ in range(rng.randint(0, 8)):
                opened_one().sock.sendall(rng.randbytes(5000))
    if told["busy"] and set(told) <= {"busy", "deadline", "nothing"}:
        return "refused", []
    return "refused", [f"connections beyond the {target}'s {MOST_CONNECTIONS[target]} were told {dict(told)}"]


def _last_word(link: Link) -> str:
    try:
        select.select([link.sock], [], [], 1.0)
        link.raise_last_word()
    except RemoteError as error:
        return error.code
    return "nothing"


def _leaving(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Clients that ask for much and go without reading it, as killed ones do."""
    for _ in range(5):
        runtime = _runtime(servers, rng.choice((Policy(), Policy(reply=Reply("token"), keeps="tokens", window=32))))
        for _ in range(rng.randint(1, 20)):
            runtime.link.post(Operation.PING, messages.Ping((), 1 << 20))
        if rng.random() < 0.5:
            runtime.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        runtime.link.close()
    return "survived", []


def _proofs(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """A handshake with another secret, with the server's own proof sent back, or with an earlier one's frames."""
    address = servers.address(rng.choice(("worker", "KV host", "relay")))
    link = connect(address, Timeouts(5.0, 5.0))
    with contextlib.closing(link):
        nonce = rng.randbytes(32)
        challenge = link.request(Operation.HELLO, messages.Hello((), 1, (frames.VERSION,), nonce)).header_as(messages.Hello)
        mac = rng.choice((challenge.mac, rng.randbytes(32), b"", bytes(32)))
        try:
            link.request(Operation.HELLO, messages.Hello((), 3, (frames.VERSION,), b"", mac, b'{"role": "kvhost"}'))
        except (RemoteError, AuthError) as error:
            return "refused", [] if error.code == "auth" else [f"a false proof was refused as {error.code}"]
    return "survived", ["a session was granted to a false proof"]


def _tls(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """A worker over TLS: a client without it, another secret, other bytes before the handshake or in the middle of a session."""
    address, spec = servers.address("TLS worker"), session_of(Policy(), servers.model)
    way = rng.choice(("without TLS", "another secret", "noise", "bytes of nobody in a session"))
    faults: list[str] = []
    with contextlib.closing(connect(address, Timeouts(10.0, 10.0))) as link:
        try:
            if way == "noise":
                link.sock.sendall(
                    rng.choice((b"\x16\x03\x01\x02\x00\x01", b"\x16\x03\x01" + bytes(600), rng.randbytes(rng.randint(1, 5000))))
                )
                link.sock.shutdown(socket.SHUT_WR)
            else:
                secret = rng.randbytes(32) if way == "another secret" else servers.secret
                shake_hands_as_client(link, secret, msgspec.to_builtins(spec), tls=way != "without TLS")
                faults = [f"a session was granted {way}"] * (way != "bytes of nobody in a session")
                link.sock.sendall(b"\x17\x03\x03\x00\x40" + rng.randbytes(64))  # a record of data under no key
                link.limits = Limits()
                link.request(Operation.PING, messages.Ping((), 64))
                faults.append("a session went on after bytes that nobody had sealed")
        except (WireError, OSError):
            pass  # all of these are refused; who must be told how is in tests/process/test_tls_trials.py
    tokens = run_session(address, servers.secret, WITNESS, servers.model, tls=True)
    return "refused", [*faults, *wrong_tokens(tokens, servers.tokens), *servers.faults("TLS worker")]


def _kv_hosts(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Two workers that write and drop each other's handles in any epoch."""
    outcome, faults = "survived", []
    with contextlib.ExitStack() as stack:
        links: list[Link] = []
        for _ in range(2):
            links.append(connect_kv(servers.address("KV host"), servers.secret, 20.0))
            stack.callback(links[-1].close)
        ids = [rng.randbytes(16) for _ in range(2)]
        layout = messages.KVLayout("m", DType.U8, rng.randint(1, 4), 1, 16, rng.choice((64, 100, 1 << 20)), 64)
        block = codecs.encode(Tensor.from_numpy(np.zeros((1, 2, 1, 64, 16), np.uint8), TensorClass.KV), "raw")
        for _ in range(40):
            kv_id, epoch = rng.choice(ids), rng.choice((0, 1, 2, 3, 1 << 32, (1 << 32) + 1))
            put = messages.PutKVBlocks((), kv_id, epoch, ((rng.randint(0, 4), rng.randint(0, 2)),), (rng.randint(0, 9),))
            asked: list[tuple[Operation, messages.Header, list[codecs.Encoded]]] = [
                (Operation.OPEN_KV, messages.OpenKV((), kv_id, layout, epoch, rng.random() < 0.7), []),
                (Operation.PUT_KV_BLOCKS, put, [block]),
                (Operation.DROP_KV, messages.DropKV((), kv_id, epoch), []),
                (Operation.FETCH_MISSING_KV_LAYERS, messages.FetchMissing((), kv_id, epoch), [control(rng.randbytes(rng.randint(1, 8)))]),
            ]
            each = rng.choice(asked)
            found = refused(lambda each=each: rng.choice(links).request(*each))
            outcome, faults = "refused" if found[0] == "refused" else outcome, faults + found[1]
    return outcome, faults


def _caches(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """A KV cache of any form."""
    runtime = _runtime(servers, Policy(kv_cache="every_step"))
    with contextlib.closing(runtime.link) as link:
        shape = tuple(rng.choice((0, 1, 2, 8, 16)) for _ in range(rng.randint(0, 6)))
        dtype = rng.choice((np.float32, np.float16, np.int64, np.uint8))
        tokens = codecs.encode(Tensor.from_numpy(np.array([rng.choice((1, 511, 512, -1))], np.int64), TensorClass.TOKENS), "raw")
        kv = codecs.encode(Tensor.from_numpy(np.zeros(shape, dtype), TensorClass.KV), "raw")
        return refused(lambda: link.request(Operation.FORWARD, messages.Forward((), 0, rng.choice((0, 1, 2, 127, 1 << 40))), [tokens, kv]))


def _hashes(servers: Servers, rng: random.Random) -> tuple[str, list[str]]:
    """Weights other than those whose hashes were offered."""
    runtime_model = ModelFiles(servers.model, load_digest(servers.model))
    link = opened(servers.address("worker"), servers.secret, session_of(Policy(weights="by_hash"), servers.model))
    with contextlib.closing(link):
        weights = runtime_model.map()
        noise = [Tensor.from_numpy(np.frombuffer(rng.randbytes(each.data.nbytes), np.uint8), TensorClass.CONTROL) for each in weights]
        hashes = b"".join(xxhash.xxh3_128_digest(bytes(each.data)) for each in noise)
        link.request(Operation.OFFER_WEIGHTS, messages.OfferWeights((), runtime_model.specs()), [control(hashes)])
        sent = [codecs.encode(each, "raw") for each in weights]
        return refused(lambda: link.request(Operation.PUT_WEIGHTS, messages.PutWeights((), tuple(range(len(sent))), True), sent), must=True)


WAYS: dict[str, Callable[[Servers, random.Random], tuple[str, list[str]]]] = {
    "uploads by hash": _uploads,
    "sessions out of bounds": _sessions_out_of_bounds,
    "odd models": _models,
    "handles without end": _handles,
    "requests in any order": _any_order,
    "calls of an engine": _engines,
    "silent connections": _silence,
    "clients that leave": _leaving,
    "false proofs": _proofs,
    "a TLS worker": _tls,
    "writers of a KV host": _kv_hosts,
    "odd caches": _caches,
    "weights of other hashes": _hashes,
}
