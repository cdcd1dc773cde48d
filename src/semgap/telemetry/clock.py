"""The clocks of a host: CLOCK_MONOTONIC, of the samples' stamps, which counts from boot; the wall clock, of manifests and logs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from semgap.processes.machine import boot_id

_READINGS = 10


def read_clock() -> dict[str, Any]:
    """This host's clocks now, in seconds, and the id of its boot."""
    return {"monotonic_s": time.monotonic(), "wall_s": time.time(), "boot_id": boot_id()}


def offset_s(read_theirs: Callable[[], Mapping[str, Any]], clock: str = "monotonic_s") -> tuple[float, float]:
    """The other side's `clock` minus this side's, and the error bound: 0 and 0 on one host, else half of the quickest round trip.

    `read_theirs` fetches the other side's `read_clock`, assumed to be read in the middle of the round trip (Cristian 1989).
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
