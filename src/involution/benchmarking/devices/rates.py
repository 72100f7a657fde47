"""What the devices share: timers by the wall clock, and buffers larger than the caches."""

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


class CaptureError(Exception):
    """A program cannot be captured in a CUDA graph."""


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
