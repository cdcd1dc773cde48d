"""Lines of a client on its progress, for the process that waits for it (experiment/trial_processes.py passes them on)."""

import sys
import time

MARK = "progress: "
EVERY_S = 2.0


class Progress:
    """Counts steps between requests, never inside one. Writes a line to stderr, at most one every `EVERY_S`."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done = steps, 0
        self._began_s = self._said_s = time.monotonic()

    def add(self, steps: int) -> None:
        """So many more steps are done."""
        self._done += steps
        now_s = time.monotonic()
        if now_s - self._said_s >= EVERY_S and self._done < self._steps:
            left_s = (now_s - self._began_s) / self._done * (self._steps - self._done)
            print(f"{MARK}{self._done} of {self._steps} steps, about {left_s:.0f} s left", file=sys.stderr, flush=True)
            self._said_s = now_s
