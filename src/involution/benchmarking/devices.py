"""What ``involution bench`` measures on: how time and memory are read there, and what is the least.

``Processor`` is the machine itself; ``Cuda`` a device with PyTorch, whose time is that between two
of its own events around a replayed graph, so that nothing of Python or of the launches is counted.
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


class NotRecordedError(Exception):
    """What a device shall run cannot be recorded."""


class Processor:
    """The machine's processors, by the wall's clock."""

    name = "cpu"
    # What others have left in a process would be used again, and not be counted.
    memory_needs_a_process = True

    def refusal(self) -> str | None:
        return None

    def said(self) -> str:
        """The processor's name and how many of it are used."""
        name = platform.processor() or platform.machine()
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                name = next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
        except (OSError, StopIteration):
            pass
        return f"{name}, {available_cpus()} processors"

    def stopwatch(self, run: Run) -> Callable[[], float]:
        """Runs it, and returns its seconds."""

        def once():
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        return once

    def copy_bandwidth(self, total: int) -> float:
        """Bytes a second, read and written, when all processors copy: for tensors of ``total``
        bytes, so that what fits into a cache is held to the cache's speed."""
        return _processors_copy(total)

    def peak(self, dtype: str) -> float:
        """Operations a second of all processors, a multiplication and an addition being two."""
        return _processors_multiply() / (2 if dtype == "float64" else 1)

    def peak_bytes(self, load: Run, prepare: Callable[[], Run]) -> int | None:
        """What the prepared run and its arguments take at most; ``load`` runs once before."""
        if not os.path.exists("/proc/self/clear_refs"):
            return None
        load()
        memory.give_back()
        before = resident("VmRSS")
        run = prepare()
        # The peak starts anew: making the arguments took more than they do.
        memory.give_back()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        run()
        return resident("VmHWM") - before


def resident(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@functools.cache
def _processors_copy(total):
    workers = available_cpus()
    part = max(total // 8 // workers, 1)
    pairs = [(np.ones(part, "float32"), np.empty(part, "float32")) for _ in range(workers)]
    return total / _best(lambda pair: np.copyto(pair[1], pair[0]), pairs)


@functools.cache
def _processors_multiply():
    """Of float32: multiply-adds in registers by the compiled core; without it, the product of two
    matrices by NumPy, which reaches less."""
    if library.targets():
        times = 20_000
        operations = library.fma_peak_loop(times) * available_cpus()
        return operations / _best(library.fma_peak_loop, [times] * available_cpus())
    n = 1536
    a = np.ones((n, n), "float32")
    return 2 * n**3 / _best(lambda _: a @ a, [None])


def _best(function, parts, repeats=30) -> float:
    """Seconds that all parts take in threads of their own, the best of several runs."""
    best = math.inf
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(repeats):
            # Several times each, so that starting the threads does not count.
            started = time.perf_counter()
            list(pool.map(lambda part: [function(part) for _ in range(10)], parts))
            best = min(best, (time.perf_counter() - started) / 10)
    return best


class Cuda:
    """PyTorch's current CUDA device, by its own events."""

    name = "cuda"
    memory_needs_a_process = False

    def refusal(self) -> str | None:
        if keras.config.backend() != "torch":
            return "PyTorch alone has kernels for CUDA, and events to time them by"
        import torch

        return None if torch.cuda.is_available() else "there is no CUDA device"

    def said(self) -> str:
        import torch

        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"

    def stopwatch(self, run: Run) -> Callable[[], float]:
        """Records the run as a graph; replays it, and returns the device's seconds.

        Raises:
            NotRecordedError: The run does what a graph cannot hold.
        """
        import torch

        # What is compiled, tuned or allocated once is not of the graph.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise NotRecordedError(f"no CUDA graph can hold it: {reason}") from error

        def once():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return once

    def copy_bandwidth(self, total: int) -> float:
        """Bytes a second, read and written, by copies inside the device of ``total`` bytes."""
        return _cuda_copies(total)

    def peak(self, dtype: str) -> float:
        """Operations a second: the product of two matrices of this type by the device's library."""
        return _cuda_multiplies(dtype)

    def peak_bytes(self, load: Run, prepare: Callable[[], Run]) -> int | None:
        import torch

        load()
        before = torch.cuda.memory_allocated()
        run = prepare()
        torch.cuda.reset_peak_memory_stats()
        # Its results live until the peak is read.
        results = run()
        peak = torch.cuda.max_memory_allocated() - before
        del results
        return peak


@functools.cache
def _cuda_copies(total):
    import torch

    source = torch.ones(max(total // 8, 1), device="cuda")
    target = torch.empty_like(source)
    return total / _cuda_best(lambda: target.copy_(source))


@functools.cache
def _cuda_multiplies(dtype):
    import torch

    n = 4096
    a = torch.randn(n, n, device="cuda").to(getattr(torch, dtype))
    return 2 * n**3 / _cuda_best(lambda: a @ a)


def _cuda_best(function, repeats=10, times=20):
    watch = Cuda().stopwatch(lambda: [function() for _ in range(times)])
    return min(watch() for _ in range(repeats)) / times


DEVICES: dict[str, Processor | Cuda] = {device.name: device for device in (Processor(), Cuda())}
