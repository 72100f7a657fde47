"""The machine's CPUs."""

import functools
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from involution.benchmarking.devices import base
from involution.ops.native import library
from involution.ops.native.library import available_cpus
from involution.utils import memory


class Cpu:
    """The machine's CPUs, timed by the wall clock."""

    name = keras_name = "cpu"
    # In one process, memory that earlier candidates freed would be reused without being counted.
    measures_memory_in_subprocess = True

    def unavailable_reason(self) -> str | None:
        return None

    def description(self) -> str:
        """The model name and the number of CPUs in use."""
        name = platform.processor() or platform.machine()
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                name = next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
        except (OSError, StopIteration):
            pass
        return f"{name}, {available_cpus()} CPUs"

    def timer(self, run: base.Run) -> Callable[[], float]:
        """A function that calls ``run`` and returns the seconds it took."""
        return base.wall_clock(run)

    def copy_bandwidth(self, total: int) -> float:
        """Warm: bytes per second, read plus written, of repeated copies by all CPUs.

        Each CPU copies one half of its share of ``total`` bytes to the other half, again and again:
        if the bytes fit into a cache, it is the cache's bandwidth. Below about 1 MB per CPU, it is
        too low: the Python calls take longer than the copies.
        """
        return _copy_bandwidth(total)

    def memory_bandwidth(self) -> base.Bandwidth:
        """Cold: bytes per second of all CPUs from and to memory.

        Each CPU passes over its own buffer; together the buffers are ``base.DRAM_BYTES``, or four
        times the caches if that is more, so nearly all lines come from memory. ``read`` is a
        maximum of the elements, loads only. ``write`` negates them in place: an ordinary store
        reads its line before it changes it, and the line is written back later, for the same
        bytes. Non-temporal stores, which skip that read, can be faster.
        """
        return _memory_bandwidth()

    def peak(self, dtype: str) -> float:
        """FLOP/s of all CPUs; a multiply-add is two operations."""
        return _peak() / (2 if dtype == "float64" else 1)

    def peak_bytes(self, load: base.Run, prepare: Callable[[], base.Run]) -> int | None:
        """Peak memory of the prepared run with its arguments; ``load`` runs first, not counted."""
        if not os.path.exists("/proc/self/clear_refs"):
            return None
        load()
        memory.malloc_trim()
        before = rss("VmRSS")
        run = prepare()
        # Resets the peak, which includes temporaries of the preparation.
        memory.malloc_trim()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        run()
        return rss("VmHWM") - before


def rss(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, the current value, or VmHWM, the peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@functools.cache
def _copy_bandwidth(total):
    workers = available_cpus()
    size = max(total // 8 // workers, 1)
    pairs = [(np.ones(size, "float32"), np.empty(size, "float32")) for _ in range(workers)]
    # 64 MB per task take about a millisecond.
    calls = max(1, min(10, 2**26 // max(total, 1)))
    return total / _best_seconds(lambda pair: np.copyto(pair[1], pair[0]), pairs, calls=calls)


@functools.cache
def _memory_bandwidth():
    workers = available_cpus()
    buffers = [
        np.ones(base.cold_bytes(_cache_bytes()) // 4 // workers, "int32") for _ in range(workers)
    ]
    total = sum(buffer.nbytes for buffer in buffers)
    # A pass takes milliseconds, so the start of the threads is negligible.
    read, write = (
        total / _best_seconds(function, buffers, repeats=10, calls=1)
        for function in (np.max, lambda buffer: np.negative(buffer, out=buffer))
    )
    return base.Bandwidth(read, write)


def _cache_bytes(root=pathlib.Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all data caches of the available CPUs; 0 on systems that do not list them."""
    sizes = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        for cache in root.glob(f"cpu{cpu}/cache/index*"):
            try:
                level, kind, size, cpus = (
                    (cache / name).read_text().strip()
                    for name in ("level", "type", "size", "shared_cpu_list")
                )
            except OSError:
                continue
            if kind != "Instruction":
                # CPUs that share a cache list the same CPUs.
                sizes[level, cpus] = int(size.removesuffix("K")) * 1024
    return sum(sizes.values())


@functools.cache
def _peak():
    """float32: multiply-adds in registers by the native core; without it, NumPy's matrix product,
    which is slower."""
    if library.targets():
        times = 20_000
        operations = library.fma_peak_loop(times) * available_cpus()
        return operations / _best_seconds(library.fma_peak_loop, [times] * available_cpus())
    n = 1536
    a = np.ones((n, n), "float32")
    return 2 * n**3 / _best_seconds(lambda _: a @ a, [None])


def _best_seconds(function, arguments, repeats=30, calls=10) -> float:
    """Seconds of one call per argument in parallel threads, the minimum of several runs.

    Several ``calls`` per task amortize the start of the threads.
    """
    best = math.inf
    with ThreadPoolExecutor(len(arguments)) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda a: [function(a) for _ in range(calls)], arguments))
            best = min(best, (time.perf_counter() - started) / calls)
    return best
