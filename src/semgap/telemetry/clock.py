"""The clock of the samples' stamps, CLOCK_MONOTONIC, which counts from each host's own start; and the wall clock, of manifests and logs."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_READINGS = 10


def read_clock() -> dict[str, Any]:
    """This host's clocks now, in seconds, and the boot that the monotonic one counts from."""
    return {"monotonic_s": time.monotonic(), "wall_s": time.time(), "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}


def offset_s(read_theirs: Callable[[], Mapping[str, Any]], clock: str = "monotonic_s") -> tuple[float, float]:
    """Their `clock` less this side's, and how far off that may be: 0 and 0 on one host, else half of the quickest round trip.

    `read_theirs` asks the other side for its `read_clock`; its reading is taken to be of the middle of the round trip (Cristian 1989).
    """
    found = []
    for _ in range(_READINGS):
        begin, theirs, end = read_clock(), read_theirs(), read_clock()
        if theirs["boot_id"] == begin["boot_id"]:
            return 0.0, 0.0
        error_s = (end["monotonic_s"] - begin["monotonic_s"]) / 2
        found.append((error_s, theirs[clock] - begin[clock] - error_s))
    error_s, offset = min(found)
    return offset, error_s
