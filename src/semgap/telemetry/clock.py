"""The clock of the samples' stamps: CLOCK_MONOTONIC, which counts from each host's own start."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_READINGS = 10


def read_clock() -> dict[str, Any]:
    """This host's clock now, in seconds, and which boot of it counts from."""
    return {"monotonic_s": time.monotonic(), "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}


def offset_s(read_theirs: Callable[[], Mapping[str, Any]]) -> tuple[float, float]:
    """Their clock less this one's, and how far off that may be: 0 and 0 on one host, else half of the quickest round trip.

    `read_theirs` asks the other side for its `read_clock`; its reading is taken to be of the middle of the round trip (Cristian 1989).
    """
    found = []
    for _ in range(_READINGS):
        begin_s = time.monotonic()
        theirs = read_theirs()
        end_s = time.monotonic()
        if theirs["boot_id"] == read_clock()["boot_id"]:
            return 0.0, 0.0
        found.append(((end_s - begin_s) / 2, theirs["monotonic_s"] - (begin_s + end_s) / 2))
    error_s, offset = min(found)
    return offset, error_s
