"""The log of a job: its output and its children's go to a file; on failure the reason also goes to the original stderr."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


class _Terminated(SystemExit):
    """SIGTERM came."""


@contextlib.contextmanager
def log_to(path: str | Path) -> Iterator[None]:
    """Redirects stdout and stderr of this process and its children to `path`; prints an exception to the original stderr, in one line.

    SIGTERM, e.g. of a cancelled Slurm job, ends the process in order: it ends its children and removes its files in /tmp.
    Redirects file descriptors: sys.stdout alone would not reach child processes.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    old_out, old_err = os.dup(1), os.dup(2)
    old_handler = signal.signal(signal.SIGTERM, _exit_in_order)
    with Path(path).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except _Terminated:
        sys.stdout.flush()  # the words before it come before it in the log
        print("semgap: ended by SIGTERM", file=sys.stderr)
        raise
    except Exception as error:
        traceback.print_exc()
        os.write(old_err, f"{type(error).__name__}: {error}\n".encode())
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(old_out, 1)
        os.dup2(old_err, 2)
        signal.signal(signal.SIGTERM, old_handler)


def _exit_in_order(*_: object) -> None:
    raise _Terminated(128 + signal.SIGTERM)
