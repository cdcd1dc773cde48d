"""A pristine parent: imports the code of programs, and forks one for each request of pristine.py. It computes nothing and has one thread.

`python -m semgap.processes.pristine_parent ORDER`, JSON of {address, workflow, imports, loads}. It ends when the workflow's process ends,
also while it loads, and its forks end with it. A fork whose requester is gone gets SIGTERM, then SIGKILL.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from semgap.processes import lifetime

_MESSAGE_BYTES = 1 << 20


@dataclass
class _Fork:
    """A running fork: its requester's connection, and when it is killed, once that is gone."""

    sock: socket.socket
    patience_s: float
    killed_at: float | None = None


class PristineParent:
    """Serves requests at an abstract Unix address until the process `workflow` ends."""

    def __init__(self, address: str, workflow: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._forks: dict[int, _Fork] = {}
        self._selector = selectors.DefaultSelector()
        self._workflow = os.pidfd_open(workflow)
        self._woken, wakes = socket.socketpair()
        for each in (self._woken, wakes):
            each.setblocking(False)
        self._wakes = wakes
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        for watched in (self._listener, self._workflow, self._woken):
            self._selector.register(watched, selectors.EVENT_READ)

    def serve(self) -> None:
        """Forks at request, and watches the forks and those who asked for them."""
        while True:
            events = self._selector.select(0.5 if any(fork.killed_at for fork in self._forks.values()) else None)
            ready = [key.fileobj for key, _ in events]
            if self._workflow in ready:
                return
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            self._reap()
            for fileobj in ready:
                if fileobj is self._listener:
                    sock, _ = self._listener.accept()
                    self._selector.register(sock, selectors.EVENT_READ)
                elif isinstance(fileobj, socket.socket) and fileobj is not self._woken and fileobj.fileno() >= 0:
                    self._hear(fileobj)
            for pid, fork in self._forks.items():
                if fork.killed_at is not None and time.monotonic() >= fork.killed_at:
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends the forks that are left, as if their requesters had ended: the patient ones in order."""
        for pid, fork in self._forks.items():
            self._end(pid, fork)
        deadline = max([fork.killed_at or 0.0 for fork in self._forks.values()], default=0.0)
        while self._forks and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.02)

    def _hear(self, sock: socket.socket) -> None:
        """A request, or the end of a requester."""
        try:
            data, fds, _, _ = socket.recv_fds(sock, _MESSAGE_BYTES, 3)
        except ConnectionResetError:
            data, fds = b"", []
        if data:
            self._fork(json.loads(data), fds, sock)
            return
        self._selector.unregister(sock)
        for pid, fork in self._forks.items():
            if fork.sock is sock:
                self._end(pid, fork)
        sock.close()

    def _end(self, pid: int, fork: _Fork) -> None:
        fork.killed_at = time.monotonic() + fork.patience_s
        os.kill(pid, signal.SIGTERM if fork.patience_s else signal.SIGKILL)

    def _fork(self, order: Mapping[str, Any], fds: list[int], sock: socket.socket) -> None:
        pid = os.fork()
        if not pid:
            self._become(order, fds)
        for fd in fds:
            os.close(fd)
        self._forks[pid] = _Fork(sock, order["patience_s"])
        _say(sock, {"pid": pid})

    def _become(self, order: Mapping[str, Any], fds: list[int]) -> None:
        """Runs the program in this fork, as `python -m` would, and ends it."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for stream, fd in enumerate(fds):
                os.dup2(fd, stream)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            lifetime.tie_fork(order["for"])
            os.environ.clear()
            os.environ.update(order["env"])
            os.chdir(order["cwd"])
            module, *arguments = order["argv"]
            sys.argv = [module, *arguments]
            sys.modules.pop(module, None)  # it runs once more, as __main__
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for output in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    output.flush()
            os._exit(status)

    def _reap(self) -> None:
        """Tells requesters of forks that ended."""
        for pid in list(self._forks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _say(self._forks.pop(pid).sock, {"status": os.waitstatus_to_exitcode(status)})


def _say(sock: socket.socket, word: Mapping[str, int]) -> None:
    """Tells a requester. It may be gone: its connection's end, which comes next, ends its fork."""
    with contextlib.suppress(OSError):
        sock.send(json.dumps(word).encode())


@contextlib.contextmanager
def _tied_to(workflow: int) -> Iterator[None]:
    """Ends this process if the process `workflow` ends, or has ended. It has one thread again afterwards, as forks need it."""
    try:
        ends = os.pidfd_open(workflow)
    except ProcessLookupError:
        os._exit(0)
    over, begun = os.pipe()
    poller = select.poll()
    for watched in (ends, over):
        poller.register(watched, select.POLLIN)

    def end_if_it_ends() -> None:
        if ends in dict(poller.poll()):
            os._exit(0)

    watch = threading.Thread(target=end_if_it_ends, daemon=True)
    watch.start()
    try:
        yield
    finally:
        os.close(begun)
        watch.join()
        os.close(over)
        os.close(ends)


def main(order: Mapping[str, Any]) -> None:
    """Loads the code, which may compile for minutes, then serves. Ends at once if another one has the address."""
    with _tied_to(order["workflow"]):
        for module in order["imports"]:
            importlib.import_module(module)
        for module, function, arguments in order["loads"]:
            getattr(importlib.import_module(module), function)(*arguments)
    try:
        parent = PristineParent(order["address"], order["workflow"])
    except OSError:  # another one was faster, or the workflow has ended
        return
    gc.collect()
    gc.freeze()  # forks share these objects: their collections need not walk, and so copy, them
    parent.serve()
    parent.end()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
