"""How fast cores read memory: the floor of a step, which reads all weights once."""

import time

import numba
import numpy as np

from semgap.engine.cpu_threads import FLAGS, Team, meet, share

_MOST_BYTES = 1 << 30  # that a pass reads


def read_bandwidth(memory: np.ndarray, threads: int = 1, passes: int = 3) -> float:
    """Bytes/s at which the cores of so many threads read `memory` (n,) float32, or its first GiB: the best of some passes.

    A pass of 0.5 GB takes about 30 ms. Memory that fits into a cache measures the cache, so pass the weights, or memory as large.
    """
    memory, sums, team = memory[: _MOST_BYTES // 4], np.zeros(threads, np.float32), Team(threads)
    team.run(_read, memory[:0], sums)  # compiles, and starts the threads
    took = []
    for _ in range(passes):
        begin = time.perf_counter()
        team.run(_read, memory, sums)
        took.append(time.perf_counter() - begin)
    return memory.nbytes / min(took)


@numba.njit(**FLAGS)
def _read(memory, sums, own):
    begin, end = share(memory.size, own, 1024)
    sums[own[0]] = _sum(memory[begin:end])
    meet(own, 0)


@numba.njit(**FLAGS, fastmath=True)
def _sum(memory):
    """The sum, from four places at once: a core reads several streams faster than one. Up to 3 last numbers are left out."""
    part = memory.size // 4
    a = b = c = d = np.float32(0)
    for i in range(part):
        a += memory[i]
        b += memory[part + i]
        c += memory[2 * part + i]
        d += memory[3 * part + i]
    return a + b + c + d
