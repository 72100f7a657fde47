"""Devices of ``involution bench``: timers, memory, and the rates of their rooflines.

``Cpu`` is timed by the wall clock. ``Cuda`` is PyTorch's current device, timed by CUDA events
around a replayed CUDA graph, which excludes Python and kernel-launch overhead.
"""

import functools
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import keras
import numpy as np

from involution.ops.native import library
from involution.ops.native.library import available_cpus
from involution.utils import memory

Run = Callable[[], object]
# Exceeds the caches of most devices; ``_cold_bytes`` has more where the caches are larger.
DRAM_BYTES = 2**28


class Bandwidth(NamedTuple):
    """Bytes per second, read and written, of streams that touch each byte once."""

    read: float
    write: float


class CaptureError(Exception):
    """A program cannot be captured in a CUDA graph."""


class Cpu:
    """The machine's CPUs, timed by the wall clock."""

    name = "cpu"
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

    def timer(self, run: Run) -> Callable[[], float]:
        """A function that calls ``run`` and returns the seconds it took."""

        def timed():
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        return timed

    def copy_bandwidth(self, total: int) -> float:
        """Warm: bytes per second, read plus written, of repeated copies by all CPUs.

        Each CPU copies one half of its share of ``total`` bytes to the other half, again and again:
        if the bytes fit into a cache, it is the cache's bandwidth. Below about 1 MB per CPU, it is
        too low: the Python calls take longer than the copies.
        """
        return _cpu_copy_bandwidth(total)

    def memory_bandwidth(self) -> Bandwidth:
        """Cold: bytes per second of all CPUs from and to memory.

        Each CPU passes over its own buffer; together the buffers are ``DRAM_BYTES``, or four times
        the caches if that is more, so nearly all lines come from memory. ``read`` is a maximum of
        the elements, loads only. ``write`` negates them in place: an ordinary store reads its line
        before it changes it, and the line is written back later, for the same bytes. Non-temporal
        stores, which skip that read, can be faster.
        """
        return _cpu_memory_bandwidth()

    def peak(self, dtype: str) -> float:
        """FLOP/s of all CPUs; a multiply-add is two operations."""
        return _cpu_peak() / (2 if dtype == "float64" else 1)

    def peak_bytes(self, load: Run, prepare: Callable[[], Run]) -> int | None:
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
def _cpu_copy_bandwidth(total):
    workers = available_cpus()
    size = max(total // 8 // workers, 1)
    pairs = [(np.ones(size, "float32"), np.empty(size, "float32")) for _ in range(workers)]
    # 64 MB per task take about a millisecond.
    calls = max(1, min(10, 2**26 // max(total, 1)))
    return total / _best_seconds(lambda pair: np.copyto(pair[1], pair[0]), pairs, calls=calls)


@functools.cache
def _cpu_memory_bandwidth():
    workers = available_cpus()
    buffers = [
        np.ones(_cold_bytes(_cache_bytes()) // 4 // workers, "int32") for _ in range(workers)
    ]
    total = sum(buffer.nbytes for buffer in buffers)
    # A pass takes milliseconds, so the start of the threads is negligible.
    read, write = (
        total / _best_seconds(function, buffers, repeats=10, calls=1)
        for function in (np.max, lambda buffer: np.negative(buffer, out=buffer))
    )
    return Bandwidth(read, write)


def _cold_bytes(caches) -> int:
    return max(DRAM_BYTES, 4 * caches)


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
def _cpu_peak():
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


class Cuda:
    """PyTorch's current CUDA device, timed by CUDA events."""

    name = "cuda"
    measures_memory_in_subprocess = False

    def unavailable_reason(self) -> str | None:
        if keras.config.backend() != "torch":
            return "cuda requires the PyTorch backend"
        import torch

        return None if torch.cuda.is_available() else "no CUDA device is available"

    def description(self) -> str:
        import torch

        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"

    def timer(self, run: Run) -> Callable[[], float]:
        """Captures ``run`` in a CUDA graph: a function that replays it and returns the seconds.

        Raises:
            CaptureError: ``run`` has operations that CUDA graphs do not support.
        """
        import torch

        # Compiles, autotunes and allocates before the capture.
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            run()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CaptureError(f"CUDA graph capture failed: {reason}") from error

        def timed():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return timed

    def copy_bandwidth(self, total: int) -> float:
        """Warm: bytes per second, read plus written, of repeated copies of half of ``total`` bytes
        to the other half; if the bytes fit into the L2 cache, it is the cache's bandwidth."""
        return _cuda_copy_bandwidth(total)

    def memory_bandwidth(self) -> Bandwidth:
        """Cold: bytes per second of copies in device memory.

        The copied bytes are ``DRAM_BYTES``, or four times the L2 cache if that is more. Reads and
        writes have one rate, since a device's stores of whole sectors do not read them first.
        """
        import torch

        # Older versions of PyTorch do not have the size.
        cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
        both = _cuda_copy_bandwidth(_cold_bytes(cache))
        return Bandwidth(both, both)

    def peak(self, dtype: str) -> float:
        """FLOP/s of cuBLAS's matrix product of this type."""
        return _cuda_peak(dtype)

    def peak_bytes(self, load: Run, prepare: Callable[[], Run]) -> int | None:
        import torch

        load()
        before = torch.cuda.memory_allocated()
        run = prepare()
        torch.cuda.reset_peak_memory_stats()
        # Keeps the results alive until the peak is read.
        results = run()
        peak = torch.cuda.max_memory_allocated() - before
        del results
        return peak


@functools.cache
def _cuda_copy_bandwidth(total):
    import torch

    source = torch.ones(max(total // 8, 1), device="cuda")
    target = torch.empty_like(source)
    return total / _cuda_best_seconds(lambda: target.copy_(source))


@functools.cache
def _cuda_peak(dtype):
    import torch

    n = 4096
    a = torch.randn(n, n, device="cuda").to(getattr(torch, dtype))
    return 2 * n**3 / _cuda_best_seconds(lambda: a @ a)


def _cuda_best_seconds(function, repeats=10, calls=20):
    timer = Cuda().timer(lambda: [function() for _ in range(calls)])
    return min(timer() for _ in range(repeats)) / calls


DEVICES: dict[str, Cpu | Cuda] = {device.name: device for device in (Cpu(), Cuda())}
