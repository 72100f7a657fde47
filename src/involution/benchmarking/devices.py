"""Devices of ``involution bench``: timers, memory, and the rates of their rooflines.

``Cpu`` is timed by the wall clock. ``Cuda`` is PyTorch's current device, timed by CUDA events
around a replayed CUDA graph, which excludes Python and kernel-launch overhead.
"""

import functools
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from involution.ops.native import library
from involution.ops.native.library import available_cpus
from involution.utils import memory

Run = Callable[[], object]


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
        """Bytes per second, read plus written, of copies by all CPUs.

        Measured with ``total`` bytes; if they fit into a cache, it is the cache's bandwidth.
        """
        return _cpu_copy_bandwidth(total)

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
    return total / _best_seconds(lambda pair: np.copyto(pair[1], pair[0]), pairs)


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


def _best_seconds(function, arguments, repeats=30) -> float:
    """Seconds of one call per argument in parallel threads, the minimum of several runs."""
    best = math.inf
    with ThreadPoolExecutor(len(arguments)) as pool:
        for _ in range(repeats):
            # Ten calls per task amortize the start of the threads.
            started = time.perf_counter()
            list(pool.map(lambda a: [function(a) for _ in range(10)], arguments))
            best = min(best, (time.perf_counter() - started) / 10)
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
        """Bytes per second, read plus written, of copies of ``total`` bytes in device memory."""
        return _cuda_copy_bandwidth(total)

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
