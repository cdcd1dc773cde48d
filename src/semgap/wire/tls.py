"""TLS 1.3 under a link: encrypts, protects from changes, and counts every byte that it adds.

The worker makes a key and a certificate for itself, which no authority signs and the client does not check. What the client checks is the
secret: the proofs of the handshake cover the hash of the certificate that each side sees (handshake.py). A third party in between has
another certificate, since it lacks the key of the worker's, and without the secret it can prove nothing over its own. The key never leaves
the process and its forks, so a secret that is lost later opens no recorded session.
"""

import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from semgap.wire.frames import TLS_MISMATCH, ClosedError, DeadlineError, WireError
from semgap.wire.tcp import WAKE_S

Answer = TypeVar("Answer")

_RECORD_BYTES = 16_384  # the most plaintext of a TLS record
_CHUNK_BYTES = 16 * _RECORD_BYTES  # encrypted before they are sent
_MOST_ANSWERS_BYTES = 4096  # of TLS's own (to KeyUpdate), which wait for the next frame that is sent
_FIRST_BYTES = (20, 21, 22)  # of a record while TLS begins; a frame begins with another
_ALWAYS = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))  # RFC 5280: no end


class TlsError(WireError):
    """TLS cannot begin, or a record was changed on its way."""

    code = "tls"


class NoTlsError(TlsError):
    """The other side speaks no TLS."""


@dataclass(frozen=True)
class Identity:
    """A worker's key, in a context, and the sha256 of its certificate."""

    context: ssl.SSLContext
    fingerprint: bytes


class TlsStream:
    """The calls of a socket that frames are sent and received by, over TLS records.

    A frame begins and ends with a record, so both sides know what TLS added to each. One thread may send while another one receives.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_side: bool) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._lock = threading.Lock()  # OpenSSL lets one thread at a time use a connection
        self._sent = self._received = 0
        self._sent_before = self._opened_before = 0
        self._raw, self._plain = memoryview(bytearray(_CHUNK_BYTES)), memoryview(bytearray(_CHUNK_BYTES))
        self._taken, self._unsent = 0, memoryview(b"")

    @property
    def cipher(self) -> str:
        """Version and cipher suite."""
        cipher = self._tls.cipher()
        return f"{self._tls.version()} {cipher[0] if cipher else 'without a cipher'}"

    @property
    def peer_fingerprint(self) -> bytes:
        """Client: sha256 of the worker's certificate."""
        return hashlib.sha256(self._tls.getpeercert(binary_form=True) or b"").digest()

    def shake_hands(self, timeout_s: float) -> None:
        """TLS's own handshake. NoTlsError if the other side speaks something else, TlsError, ClosedError, DeadlineError."""
        deadline, is_done, looked = time.monotonic() + timeout_s, False, False
        while not is_done:
            try:
                self._tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise TlsError(f"TLS 1.3 could not begin: {_why(error)}") from error
            _patiently(self._send_on, deadline)
            if not looked and not is_done:
                first, looked = _patiently(lambda: self._sock.recv(1, socket.MSG_PEEK), deadline), True
                if first and first[0] not in _FIRST_BYTES:
                    raise NoTlsError(TLS_MISMATCH)
            if not is_done and not _patiently(lambda: self._take_in(0), deadline):
                raise ClosedError("the peer closed the connection while TLS began")

    def added_by_sending(self, frame_bytes: int) -> int:
        """TCP payload sent since the last call, the handshake's included, less a frame of so many bytes."""
        before, self._sent_before = self._sent_before, self._sent
        return self._sent - before - frame_bytes

    def added_by_receiving(self, frame_bytes: int) -> int:
        """TCP payload received since the last call, up to the last record that was opened, less a frame of so many bytes."""
        opened = self._received - self._incoming.pending
        before, self._opened_before = self._opened_before, opened
        return opened - before - frame_bytes

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Sends the beginning of `buffers` and gives its length. After a BlockingIOError the same `buffers` must come again.

        TlsError after a record that was changed: TLS has ended.
        """
        if not self._unsent:
            self._taken = self._gathered(buffers)
            try:
                with self._lock:
                    for begin in range(0, self._taken, _RECORD_BYTES):
                        self._tls.write(self._plain[begin : min(begin + _RECORD_BYTES, self._taken)])
            except ssl.SSLError as error:
                raise TlsError(f"TLS sends no more: {_why(error)}") from error
        self._send_on()
        return self._taken

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Receives into `buffer`, from one record at most; 0 at the connection's end. Reads the socket once at most.

        BlockingIOError if no record is whole by then. TlsError for a record that was changed, or a peer that asks for keys without end.
        """
        if self._outgoing.pending > _MOST_ANSWERS_BYTES:
            raise TlsError("the peer asks for new keys again and again")
        has_read = False
        while True:
            try:
                with self._lock:
                    if self._incoming.pending or self._tls.pending():
                        return self._tls.read(nbytes or buffer.nbytes, buffer)  # type: ignore[return-value] # a number, with a buffer
            except ssl.SSLWantReadError:
                if has_read:
                    raise BlockingIOError from None
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                raise TlsError(f"a TLS record was changed on its way, or is none: {_why(error)}") from error
            if not self._take_in(flags & ~socket.MSG_WAITALL):
                return 0
            has_read = True

    def recvmsg_into(self, buffers: Sequence[memoryview], ancillary_bytes: int = 0, flags: int = 0) -> tuple[int]:
        """Receives into `buffers` in order; with MSG_WAITALL until they are full, a read has waited in vain, or WAKE_S have passed."""
        count, until = 0, time.monotonic() + WAKE_S
        for buffer in buffers:
            done = 0
            while done < buffer.nbytes:
                try:
                    got = self.recv_into(buffer[done:], 0, flags)
                except BlockingIOError:
                    if not count:
                        raise
                    return (count,)
                done, count = done + got, count + got
                if not got or not flags & socket.MSG_WAITALL or time.monotonic() > until:
                    return (count,)
        return (count,)

    def _gathered(self, buffers: Sequence[memoryview]) -> int:
        """Copies the beginning of `buffers` into one piece of memory."""
        taken = 0
        for buffer in buffers:
            piece = buffer[: _CHUNK_BYTES - taken]
            self._plain[taken : taken + piece.nbytes] = piece
            taken += piece.nbytes
        return taken

    def _send_on(self) -> None:
        """Sends what is encrypted, in one call. BlockingIOError if the socket did not take all of it."""
        if not self._unsent:
            with self._lock:
                self._unsent = memoryview(self._outgoing.read())
        if self._unsent:
            sent = self._sock.send(self._unsent)
            self._sent += sent
            self._unsent = self._unsent[sent:]
        if self._unsent:
            raise BlockingIOError

    def _take_in(self, flags: int) -> int:
        got = self._sock.recv_into(self._raw, 0, flags)
        with self._lock:
            self._incoming.write(self._raw[:got])
        self._received += got
        return got


def new_identity() -> Identity:
    """A fresh Ed25519 key, and a certificate that names nobody and that the key itself signs."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key, nobody = ed25519.Ed25519PrivateKey.generate(), x509.Name([])
    builder = x509.CertificateBuilder(nobody, nobody, key.public_key(), x509.random_serial_number(), *_ALWAYS)
    certificate = builder.sign(key, None)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no session is resumed
    file = os.memfd_create("semgap-identity", os.MFD_CLOEXEC)  # Python's ssl reads files alone
    try:
        pem = serialization.Encoding.PEM
        os.write(file, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        os.write(file, certificate.public_bytes(pem))
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return Identity(context, certificate.fingerprint(hashes.SHA256()))


def as_client(sock: socket.socket) -> TlsStream:
    """The client's end of TLS on a connection. It takes any certificate: the proofs of the secret cover its hash."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return TlsStream(sock, context, server_side=False)


def _patiently(call: Callable[[], Answer], deadline: float) -> Answer:
    """The answer of a call to the socket, which is repeated while it blocks. DeadlineError, even if it need not block; ClosedError."""
    while time.monotonic() <= deadline:
        try:
            return call()
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClosedError(f"the peer closed the connection while TLS began: {error}") from error
    raise DeadlineError("TLS did not begin in time")


def _why(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
