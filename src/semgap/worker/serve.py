"""The GPU side: listens, authenticates, and serves each session in a freshly forked process.

The listening process loads the executor's code once and never computes. So a session starts in milliseconds, inherits nothing from
earlier sessions, and ends alone if its client misbehaves.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from semgap.engine.executor_choice import preload
from semgap.engine.gpu_failure import gpu_failure
from semgap.processes.machine import boot_id, measuring, out_of_memory, split_cores
from semgap.processes.remote_lifetime import Attachment
from semgap.processes.scratch import sweep
from semgap.wire import frames
from semgap.wire.frames import WireError
from semgap.wire.handshake import ShakeHands, handshake_of_worker, read_secret, turn_away
from semgap.wire.ledger import Direction
from semgap.wire.link import Link, Refused
from semgap.wire.listen import Signals, accepted, address_of, listen, pin
from semgap.wire.tcp import Timeouts, parse_address
from semgap.wire.waiting import ready
from semgap.worker.forking import forked
from semgap.worker.resources import KVHostAddress, Resources
from semgap.worker.session import Session
from semgap.worker.weight_store import WeightStore, upload_budget

_NAME = "semgap worker"
_SESSIONS_END_S = 2.0
_STOP_THE_WORKER = 86  # exit status of a session whose client requested a shutdown


@dataclass(frozen=True)
class ServeOptions:
    """How a worker listens and computes. `cpus` pins it; `device` is 'cpu', 'cuda' or 'auto'. Sessions may ask for another executor than
    `executor`, whose code is loaded as the worker starts.

    `attached`: a trial on another node started it, and its standard input brings an `Order`. The order's secret replaces a file's, the
    cores are split as in a trial, the worker holds this machine's measuring lock, and it ends when its input does.
    """

    listen: str = "127.0.0.1:0"
    secret_file: Path | None = None
    tls: bool = False  # with clients and the KV host
    threads: int = 1
    device: str = "auto"
    executor: str = "auto"
    cpus: tuple[int, ...] = ()
    io_cpus: tuple[int, ...] = ()  # see Resources
    max_sessions: int = 8
    idle_s: float = 120.0
    frame_s: float = 30.0
    max_payload_bytes: int = 0  # 0: half of this machine's memory
    weight_store_bytes: int = 0  # kept for later sessions that offer by hash; 0: weight_store.upload_budget
    weight_cache: Path | None = None  # directory of the kept weights, for later workers too; None: in memory
    attached: bool = False
    kv_host: str | None = None  # HOST:PORT of a `semgap kvhost` for the sessions' KV blocks, which has the same secret


def serve(options: ServeOptions) -> None:
    """Listens until SIGTERM or a client's shutdown request. Prints one line of JSON, {"address": ...}, once clients can connect."""
    if options.attached:
        attachment = Attachment()
        computing, thin = split_cores(options.threads, options.cpus, options.io_cpus)
        with contextlib.nullcontext() if attachment.order.lock_boot_id == boot_id() else measuring():
            _serve(replace(options, cpus=computing, io_cpus=thin), attachment.order.secret.encode(), attachment)
    else:
        _serve(options, read_secret(options.secret_file))


def _serve(options: ServeOptions, secret: bytes, attachment: Attachment | None = None) -> None:
    shake_hands = handshake_of_worker(secret, options.tls)
    kv_host = KVHostAddress(options.kv_host, secret, options.tls) if options.kv_host else None
    if kv_host:
        parse_address(kv_host.address)
    listener = listen(options.listen, has_secret=bool(secret))
    sweep()
    allowed = tuple(os.sched_getaffinity(0))
    if options.io_cpus:
        pin(options.io_cpus)  # fails now for unavailable cores, not in the first step that misses blocks
    pin(options.cpus or allowed)
    preload(options.device, options.executor)
    sessions: set[int] = set()
    store = WeightStore(options.weight_store_bytes or upload_budget(options.weight_cache), options.weight_cache)
    resources = Resources(store, kv_host, options.io_cpus)
    gc.freeze()  # sessions share these objects: their collections need not walk, and so copy, them
    with Signals() as signals:
        watched: list[Any] = [listener, signals.wakeup, store.incoming, resources.engines.incoming]
        watched += [attachment] if attachment else []
        print(json.dumps({"address": address_of(listener), "pid": os.getpid()}), flush=True)
        while not signals.stop:
            readable, _ = ready(watched, timeout_s=1.0)
            signals.drain()
            if store.incoming in readable:
                store.take_in()
            resources.engines.reap()
            if resources.engines.incoming in readable:
                resources.engines.take_in([listener])
            if _reap(sessions) or (attachment and attachment.has_ended(attachment in readable)):
                break
            if listener in readable:
                _fork_session(listener, options, shake_hands, sessions, resources)
    _end_sessions(sessions)


def _end_sessions(sessions: set[int]) -> None:
    """Ends the sessions, and waits briefly until they have stopped their samplers; the rest ends with this process."""
    for pid in sessions:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _SESSIONS_END_S
    while sessions and time.monotonic() < deadline:
        _reap(sessions)
        time.sleep(0.02)


def _fork_session(
    listener: socket.socket, options: ServeOptions, shake_hands: ShakeHands, sessions: set[int], resources: Resources
) -> None:
    arrived = accepted(listener, _NAME)
    if arrived is None:
        return
    sock, peer = arrived
    if len(sessions) >= options.max_sessions:
        turn_away(sock, f"{options.max_sessions} sessions are open, the most that this worker serves", _NAME)
        return
    try:
        sessions.add(forked(lambda: _run_session(sock, options, shake_hands, peer, resources), [listener]))
    except OSError as error:  # of the fork
        turn_away(sock, f"this worker can start no session now: {error}", _NAME)
    else:
        sock.close()


def _reap(sessions: set[int]) -> bool:
    """Forgets sessions that ended. True if a client of one requested a shutdown."""
    stop = False
    for pid in list(sessions):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            sessions.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            stop |= code == _STOP_THE_WORKER
            if code < 0:  # it could say nothing itself
                print(f"{_NAME}: session {pid} ended with signal {-code}", file=sys.stderr, flush=True)
    return stop


def _run_session(sock: socket.socket, options: ServeOptions, shake_hands: ShakeHands, peer: object, resources: Resources) -> int:
    """Serves one client, from handshake to goodbye, and gives the exit status. Raises nothing that a client can cause."""
    link = Link(sock, Direction.DOWN, Timeouts(options.idle_s, options.frame_s))
    session = Session(link, options.device, options.threads, resources, options.max_payload_bytes)
    try:
        shake_hands(link, session.grant)
        return _STOP_THE_WORKER if session.run() else 0
    except frames.ClosedError:
        return 0
    except (WireError, Refused) as error:
        print(f"semgap worker: session of {peer} ended: {error}", file=sys.stderr, flush=True)
        _say_why(link, error.code, str(error))
        return 1
    except MemoryError as error:
        print(f"semgap worker: session of {peer} ended: {out_of_memory(error)}", file=sys.stderr, flush=True)
        _say_why(link, "memory", f"the session's {out_of_memory(error)}")
        return 1
    except Exception as error:
        traceback.print_exc()
        failure = gpu_failure(error)  # this process has lost its GPU; the worker has none open and lives on
        if failure:
            _say_why(link, "gpu", failure)
        else:
            _say_why(link, "internal", f"{type(error).__name__}: {error}; the worker's log has the traceback")
        return 1
    finally:
        try:
            session.end()
        finally:
            link.close()


def _say_why(link: Link, code: str, message: str) -> None:
    try:
        link.reply_error(None, code, message)
        link.drain(1.0)
    except (WireError, OSError) as error:
        print(f"semgap worker: the client did not take the error: {error}", file=sys.stderr, flush=True)
