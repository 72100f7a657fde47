"""What the devices share: timing, and the size of buffers that exceed the caches."""

import time
from collections.abc import Callable
from typing import NamedTuple

Run = Callable[[], object]
# Exceeds the caches of most devices; ``cold_bytes`` has more where the caches are larger.
DRAM_BYTES = 2**28


class Bandwidth(NamedTuple):
    """Bytes per second, read and written, of streams that touch each byte once."""

    read: float
    write: float


def cold_bytes(caches: int) -> int:
    """Bytes of buffers that caches of ``caches`` bytes hold little of."""
    return max(DRAM_BYTES, 4 * caches)


def wall_clock(run: Run) -> Callable[[], float]:
    """A function that calls ``run``, which is synchronous, and returns the seconds it took."""

    def timed():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return timed


def best_seconds(timer: Callable[[], float], calls: int, repeats: int = 10) -> float:
    """Seconds of one of the ``calls`` that each run of ``timer`` times: the minimum of runs."""
    return min(timer() for _ in range(repeats)) / calls
