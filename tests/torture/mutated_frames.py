"""Mutated frames against a worker, a KV host and a relay, from recorded sessions of every mode.

A round is one connection: a right beginning of a recorded session, frames that are requests of other values up to the first that the
other side cannot go on after, and at the end one that it must not take. Every frame that the other side took or refused counts as a try.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from semgap import codecs
from semgap.kv.host import ROLE, connect_kv
from semgap.policy import CodecChoice, Policy, Reply
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages
from semgap.wire.frames import Flag, WireError
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.link import connect
from semgap.wire.messages import Operation
from semgap.wire.tcp import Timeouts
from torture.campaign import Book, Try
from torture.mutations import broken, request
from torture.recording import Recording, expected_tokens, remote_modes, run_session, tee, tiny_model
from torture.servers import Servers

FRAMES = {"worker": 450_000, "KV host": 450_000, "relay": 100_000}
SHORT = {"worker": 6_000, "KV host": 3_000, "relay": 1_000}
A_ROUND = 500
_ANSWERS_WITHIN_S = 60.0
_BATCHED_ROUNDS = 0.06
_BEFORE_THE_SECRET = 0.05
_ERROR, _HELLO = msgspec.msgpack.Decoder(messages.ErrorHeader), msgspec.msgpack.Decoder(messages.Hello)
WITNESS = Policy(weights="by_hash", reply=Reply("token"), codec=CodecChoice(tokens="compact", kv="zstd"), keeps="tokens", window=4)
KV_WITNESS = msgspec.structs.replace(WITNESS, recovery="delta", shadow="kvhost")


@dataclass(frozen=True)
class Answers:
    """What came back on a connection. `last`: the frame after which the other side did not go on, by number, and its words.

    `answered`: the last frame that had an answer of its own, by number; 0 if none had.
    """

    refused: int
    codes: frozenset[str]
    last: int | None
    words: str
    ended: bool
    granted: bool
    answered: int = 0


def fire(address: str, secret: bytes, session: dict, stream: Sequence[bytes], authenticated: bool = True) -> Answers:
    """Opens a session, sends the stream without waiting for answers, and takes them up to the end of the connection."""
    link = connect(address, Timeouts(20.0, 20.0))
    with contextlib.closing(link):
        if authenticated:
            shake_hands_as_client(link, secret, session)
        return _answers(_exchange(link.sock, b"".join(stream)), authenticated)


def _exchange(sock: socket.socket, out: bytes) -> tuple[bytes, bool]:
    """Sends all, reads all. The bytes that came, and whether the other side ended the connection in time."""
    sock.setblocking(False)
    came, view, deadline, poller = bytearray(), memoryview(out), time.monotonic() + _ANSWERS_WITHIN_S, select.poll()
    poller.register(sock, select.POLLIN | select.POLLOUT)
    sending = True
    while time.monotonic() < deadline:
        poller.poll(1000)
        with contextlib.suppress(BlockingIOError):
            try:
                if sending and view:
                    view = view[sock.send(view) :]
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise
                view = view[:0]  # it closed already; its last words are still to be read
        if sending and not view:
            sending = False
            poller.modify(sock, select.POLLIN)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        try:
            data = sock.recv(1 << 18)
        except BlockingIOError:
            continue
        except OSError:
            return bytes(came), True
        if not data:
            return bytes(came), True
        came += data
    return bytes(came), False


def _answers(came: tuple[bytes, bool], authenticated: bool) -> Answers:
    stream, ended = came
    at, refused, codes, last, words, granted, answered = 0, 0, set(), None, "", False, 0
    while at + frames.PREFIX_BYTES <= len(stream):
        _, _, operation, _, flags, header, sequence, payload = frames.PREFIX.unpack_from(stream, at)
        begin = at + frames.PREFIX_BYTES
        at = begin + header + payload
        if operation != Operation.HELLO:
            answered = max(answered, sequence)
        if flags & Flag.ERROR and at <= len(stream):
            error = _ERROR.decode(stream[begin : begin + header])
            codes.add(error.code)
            if operation == Operation.HELLO:
                last, words = sequence + 1, f"{error.code}: {error.message}"
            else:
                refused += 1
        elif operation == Operation.HELLO and not authenticated:
            granted |= _HELLO.decode(stream[begin : begin + header]).step == 4
    return Answers(refused, frozenset(codes), last, words, ended, granted, answered)


@dataclass
class Attack:
    """The servers, the recordings, and what is right."""

    book: Book
    servers: Servers
    sessions: dict[str, list[Recording]]
    tokens: list[int]

    def round(self, one: Try) -> None:
        """One connection to the target, then the next client."""
        rng = one.rng
        recordings = self.sessions["KV host" if one.target == "KV host" else "worker"]
        recording = rng.choice(recordings)
        if recording.session.get("policy", {}).get("batching") and rng.random() > _BATCHED_ROUNDS * 3:
            recording = rng.choice([each for each in recordings if not each.session.get("policy", {}).get("batching")])
        authenticated = rng.random() >= _BEFORE_THE_SECRET
        stream, begins, must_end = _stream(rng, recording, recordings, authenticated)
        address = self.servers.address(one.target)
        try:
            answers = fire(address, self.servers.secret, recording.session, stream, authenticated)
        except (WireError, OSError) as error:
            self.book.wrong(one, f"no session could be opened: {error}")
            return
        ends = begins + must_end - 1
        faults = [
            *self.servers.faults(one.target),
            *faults_of(answers, ends if authenticated else None, one.target == "relay"),
            *self.next_client(one),
        ]
        if faults:
            self.book.wrong(one, "; ".join(faults))
            return
        known = answers.refused + 1  # where the last word was lost
        taken = answers.last - begins + 1 if answers.last is not None and authenticated else known if authenticated else 1
        refused = min(answers.refused, taken - 1) + 1
        self.book.refused(one, refused)
        self.book.survived(one, taken - refused)

    def next_client(self, one: Try) -> list[str]:
        """Faults of the next client, who must get the right tokens, or its own blocks."""
        try:
            if one.target == "KV host" and one.number % 20:
                return blocks_come_back(self.servers.address("KV host"), self.servers.secret, one.rng)
            policy = KV_WITNESS if one.target == "KV host" else WITNESS
            got = run_session(self.servers.witness(one.target), self.servers.secret, policy, self.servers.model)
        except (WireError, OSError, ValueError) as error:
            return [f"the next client failed: {type(error).__name__}: {error}"]
        return wrong_tokens(got, self.tokens)


def faults_of(answers: Answers, ends: int | None, through_relay: bool = False) -> Iterator[str]:
    """What the other side did wrong. `ends`: the frame that it had to refuse, and after which it took none; None before the handshake.

    A worker that ends a connection on which frames are still coming resets it. A relay then resets its own, and the last word may be lost.
    """
    if not answers.ended:
        yield f"the connection was still open {_ANSWERS_WITHIN_S:g} s later"
    if "internal" in answers.codes:
        yield f"an untyped error: {answers.words}"
    if answers.granted:
        yield "a session was granted without the secret"
    if ends is None or not answers.ended:
        return
    if answers.last is None and not through_relay:
        yield "the connection ended without a word, though its last frame was broken"
    if answers.answered >= ends or (answers.last is not None and answers.last > ends):
        yield f"the broken frame {ends} was taken; {answers.words}"


def wrong_tokens(got: Sequence[int], right: Sequence[int]) -> list[str]:
    """A fault if a client's tokens are not the right ones."""
    return [] if list(got) == list(right) else [f"the next client got tokens {list(got)}, right are {list(right)}"]


def blocks_come_back(address: str, secret: bytes, rng: random.Random) -> list[str]:
    """A fault if a worker does not get back the block that it put into a KV host."""
    link = connect_kv(address, secret, 20.0)
    with contextlib.closing(link):
        kv_id = rng.randbytes(16)
        layout = messages.KVLayout("witness", DType.U8, 2, 1, 16, 96, 64)
        epoch = link.request(Operation.OPEN_KV, messages.OpenKV((), kv_id, layout)).header_as(messages.KVOpened).epoch
        block = np.frombuffer(rng.randbytes(2 * 64 * 16), np.uint8).reshape(1, 2, 1, 64, 16)
        put = messages.PutKVBlocks((), kv_id, epoch, ((1, 0),), (1,))
        link.request(Operation.PUT_KV_BLOCKS, put, [codecs.encode(Tensor.from_numpy(block, TensorClass.KV), "raw")])
        mask = codecs.encode(Tensor.from_numpy(np.array([[0, 0], [1, 0]], np.uint8), TensorClass.CONTROL), "raw")
        came = link.request(Operation.FETCH_MISSING_KV_LAYERS, messages.FetchMissing((), kv_id, epoch), [mask])
        same = bytes(came.payloads[0]) == block.tobytes()
        link.request(Operation.DROP_KV, messages.DropKV((), kv_id, epoch))
        return [] if same else ["the next worker got other bytes than it put into the KV host"]


def _stream(rng: random.Random, recording: Recording, recordings: Sequence[Recording], authenticated: bool) -> tuple[list[bytes], int, int]:
    """The frames to send after the handshake, the number of the first mutated one, and how many there are."""
    if not authenticated:
        return [broken(rng, recording.hellos, 1)[1]], 1, 1
    own = recording.frames
    kept = rng.randrange(len(own)) if rng.random() < 0.7 else 0
    right = [frame.packed() for frame in own[:kept]]
    begins = len(recording.hellos) + kept + 1
    pool = own if rng.random() < 0.8 else rng.choice(recordings).frames
    count = rng.choice((1, A_ROUND // 2, A_ROUND, A_ROUND, A_ROUND * 3 // 2))
    mutated = [request(rng, pool).packed(begins + at) for at in range(count - 1)]
    return [*right, *mutated, broken(rng, pool, begins + count - 1)[1]], begins, count


def record_all(servers: Servers, tokens: list[int]) -> dict[str, list[Recording]]:
    """A session of every remote mode, as the worker and the KV host saw it. Each exact one gives the right tokens, or fails here."""
    found: dict[str, list[Recording]] = {"worker": [], "KV host": []}
    for mode, policy in remote_modes().items():
        with tee(servers.address("worker")) as before_worker:
            got = run_session(before_worker.address, servers.secret, policy, servers.model)
            assert policy.keeps == "lossy" or got == tokens, f"{mode} gives tokens {got}, right are {tokens}"
            found["worker"].append(Recording.of(mode, bytes(before_worker.sent[0])))
    assert servers.kv_tee is not None
    found["KV host"] = [Recording.of(f"KV host {number}", bytes(sent)) for number, sent in enumerate(servers.kv_tee.sent, 1)]
    assert found["KV host"] and found["KV host"][0].session == ROLE
    return found


def attack(book: Book, place: Path, short: bool) -> None:
    """The whole attack."""
    goals = SHORT if short else FRAMES
    model = tiny_model(place / "model")
    with Servers.started(place, model) as servers:
        servers.tokens = expected_tokens(model)
        running = Attack(book, servers, record_all(servers, servers.tokens), servers.tokens)
        done = set()
        for one in book.turns(dict.fromkeys(goals, max(goals.values()))):
            book.plan(one.target, goals[one.target])
            if one.target in done:
                continue
            running.round(one)
            if book.rows[one.target].tries >= goals[one.target]:
                done.add(one.target)
            if done >= book.rows.keys():
                break
        for target in book.rows:
            book.plan(target, goals[target])
            book.note(target, f"rounds of up to {A_ROUND * 3 // 2} frames, each followed by a client")
