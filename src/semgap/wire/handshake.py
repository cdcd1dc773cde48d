"""The handshake: both sides prove that they hold the shared secret, then agree on a session."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from semgap.wire import frames
from semgap.wire.frames import Frame, FrameError, Limits, WireError
from semgap.wire.ledger import Direction
from semgap.wire.link import Link
from semgap.wire.messages import Hello, Operation
from semgap.wire.tcp import Timeouts

if TYPE_CHECKING:
    from semgap.wire.tls import Identity  # most sides need no ssl

HANDSHAKE_S = 5.0  # for each of its four frames
ShakeHands = Callable[[Link, Callable[[dict], dict]], None]
"""A worker's half of the handshake on a link, with the function that grants a session."""

_NONCE_BYTES = 32


class AuthError(WireError):
    """The peer does not hold the shared secret, or this side has none that works."""

    code = "auth"


def shake_hands_as_client(link: Link, secret: bytes, session: dict, tls: bool = False) -> dict:
    """Proves to each side that the other holds `secret`, requests `session`, and gives the worker's grant.

    Four frames: nonce; nonce and the worker's proof; the client's proof and the session; the grant. A proof is HMAC-SHA256 over a
    label, both nonces and, for the client, the session: nobody can replay or reflect it. With `tls` TLS begins before, and the proofs
    are over the hash of the worker's certificate too: nobody can stand in between.
    """
    seen = _secured_as_client(link, secret) if tls else ()
    ours = secrets.token_bytes(_NONCE_BYTES)
    link.limits = Limits(header_bytes=65_535, payload_bytes=0, buffers=0)
    challenge = link.request(Operation.HELLO, Hello((), 1, (frames.VERSION,), ours)).header_as(Hello)
    if not hmac.compare_digest(challenge.mac, _proof(secret, b"worker", ours, challenge.nonce, *seen)):
        way_out = "both sides" if secret else "this client, which has none,"
        between = ", or somebody stands between" if tls else ""
        raise AuthError(f"the worker does not hold this client's secret{between}; give {way_out} the same token file (--secret-file)")
    body = msgspec.json.encode(session)
    mac = _proof(secret, b"client", ours, challenge.nonce, body, *seen)
    granted = link.request(Operation.HELLO, Hello((), 3, (frames.VERSION,), b"", mac, body)).header_as(Hello)
    return msgspec.json.decode(granted.body)


def shake_hands_as_worker(link: Link, secret: bytes, grant: Callable[[dict], dict], identity: Identity | None = None) -> None:
    """The worker's half. `grant` turns the requested session into the grant, or raises to refuse it. TLS alone with an `identity`."""
    idle, link.timeouts = link.timeouts, Timeouts(HANDSHAKE_S, HANDSHAKE_S)
    seen = _secured_as_worker(link, identity) if identity else ()
    first = link.next_request()
    opening = _hello(first, 1)
    if frames.VERSION not in opening.versions:
        raise FrameError("version", f"the client speaks versions {opening.versions}, this worker {frames.VERSION}")
    if len(opening.nonce) != _NONCE_BYTES:
        raise FrameError("hello", f"a nonce of {len(opening.nonce)} bytes, expected {_NONCE_BYTES}")
    ours = secrets.token_bytes(_NONCE_BYTES)
    proof = _proof(secret, b"worker", opening.nonce, ours, *seen)
    link.reply(first, Hello((), 2, (frames.VERSION,), ours, proof))
    second = link.next_request()
    asked = _hello(second, 3)
    if not hmac.compare_digest(asked.mac, _proof(secret, b"client", opening.nonce, ours, asked.body, *seen)):
        raise AuthError("the client does not hold this worker's secret; give both sides the same token file")
    try:
        session = msgspec.json.decode(asked.body, type=dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError("hello", f"the requested session does not decode: {error}") from error
    link.reply(second, Hello((), 4, (frames.VERSION,), b"", b"", msgspec.json.encode(grant(session))))
    link.timeouts = idle


def _secured_as_client(link: Link, secret: bytes) -> tuple[bytes]:
    """Begins TLS; gives the hash of the worker's certificate. A worker that speaks none may say why: RemoteError."""
    from semgap.wire import tls

    _require_secret(secret)
    stream = tls.as_client(link.sock)
    try:
        stream.shake_hands(link.timeouts.idle_s)
    except (tls.NoTlsError, frames.ClosedError):
        link.raise_last_word()
        raise
    link.secure(stream)
    return (stream.peer_fingerprint,)


def _secured_as_worker(link: Link, identity: Identity) -> tuple[bytes]:
    from semgap.wire import tls

    stream = tls.TlsStream(link.sock, identity.context, server_side=True)
    stream.shake_hands(link.timeouts.idle_s)
    link.secure(stream)
    return (identity.fingerprint,)


def handshake_of_worker(secret: bytes, tls: bool) -> ShakeHands:
    """`shake_hands_as_worker` of a process that listens, with all clients over TLS or with none. AuthError for TLS without a secret."""
    if not tls:
        return lambda link, grant: shake_hands_as_worker(link, secret, grant)
    from semgap.wire.tls import new_identity

    _require_secret(secret)
    identity = new_identity()
    return lambda link, grant: shake_hands_as_worker(link, secret, grant, identity)


def _require_secret(secret: bytes) -> None:
    """AuthError for TLS without a secret: nothing would say who is at the other end."""
    if not secret:
        raise AuthError("TLS needs the shared secret, by which each side knows the other; give a token file (--secret-file)")


def turn_away(sock: socket.socket, why: str, who: str) -> None:
    """Tells a peer that is not served the reason (code `busy`), and closes its connection. `who` of this machine it is that says so."""
    try:
        Link(sock, Direction.DOWN, Timeouts(1.0, 1.0)).reply_error(None, "busy", why)
    except (WireError, OSError) as error:
        print(f"{who}: could not turn a client away: {error}", file=sys.stderr, flush=True)
    finally:
        sock.close()


def write_secret(path: Path) -> None:
    """Makes a new token file, readable by its owner alone. AuthError if the file exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AuthError(f"{path} exists already; use it, or choose another name") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def read_secret(path: Path | None) -> bytes:
    """The secret in a token file; without a path the empty secret, which only loopback workers accept.

    AuthError if the file is missing, too short, or readable by others.
    """
    if path is None:
        return b""
    path = path.expanduser()
    try:
        mode, secret = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise AuthError(f"token file {path} cannot be read: {error.strerror}; make one with `semgap secret {path}`") from error
    if stat.S_IMODE(mode) & 0o077:
        raise AuthError(f"token file {path} has mode {stat.S_IMODE(mode):04o}, so others can read it; chmod 600 {path}")
    if len(secret) < 32:
        raise AuthError(f"token file {path} holds {len(secret)} characters, fewer than 32; make one with `semgap secret {path}`")
    return secret


def _hello(frame: Frame, step: int) -> Hello:
    if frame.operation is not Operation.HELLO or not isinstance(frame.header, Hello) or frame.header.step != step:
        raise FrameError("hello", f"{frame.operation.name.lower()} came where step {step} of the handshake was expected")
    return frame.header


def _proof(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    message = b"semgap" + b"".join(len(part).to_bytes(8, "little") + part for part in (label, *parts))
    return hmac.new(secret, message, hashlib.sha256).digest()
