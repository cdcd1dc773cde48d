"""Where a job's words go: its log file, children included, and on failure the reason to whoever waits for it."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def log_to(path: str | Path) -> Iterator[None]:
    """Sends this process's and its children's stdout and stderr to `path`; an exception is told to the old stderr in one paragraph.

    Works on file descriptors, since redirecting sys.stdout would not reach child processes.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    old_out, old_err = os.dup(1), os.dup(2)
    with Path(path).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        os.write(old_err, f"{type(error).__name__}: {error}\n".encode())
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(old_out, 1)
        os.dup2(old_err, 2)
