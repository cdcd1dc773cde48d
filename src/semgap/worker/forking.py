"""Forks of the listening process: sessions and engines. They begin in milliseconds, with the executor's code loaded."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from socket import socket

from semgap.processes.lifetime import end_with_parent


def forked(work: Callable[[], int], closes: Sequence[socket]) -> int:
    """Runs `work` in a fork of this process, without the sockets `closes`; gives the fork's pid.

    The fork exits with the value of `work`, or in order at a SIGTERM. It is killed when this process ends.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        end_with_parent(parent)
        for each in closes:
            each.close()
        status = work()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
