"""PyTorch's current CUDA device.

It is timed by CUDA events around a replayed CUDA graph, which excludes Python and the overhead of
launching kernels.
"""

import functools
from collections.abc import Callable

import keras

from involution.benchmarking.devices import base

CALLS = 20


class CaptureError(Exception):
    """A program cannot be captured in a CUDA graph."""


class TorchCuda:
    """PyTorch's current CUDA device, timed by CUDA events."""

    name = keras_name = "cuda"
    measures_memory_in_subprocess = False

    def unavailable_reason(self) -> str | None:
        if keras.config.backend() != "torch":
            return "cuda requires the PyTorch or the JAX backend"
        import torch

        return None if torch.cuda.is_available() else "no CUDA device is available"

    def description(self) -> str:
        import torch

        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"

    def timer(self, run: base.Run) -> Callable[[], float]:
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
        return _copy_bandwidth(total)

    def memory_bandwidth(self) -> base.Bandwidth:
        """Cold: bytes per second of copies in device memory.

        The copied bytes are ``base.DRAM_BYTES``, or four times the L2 cache if that is more. Reads
        and writes have one rate, since a device's stores of whole sectors do not read them first.
        """
        import torch

        # Older versions of PyTorch do not have the size.
        cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
        both = _copy_bandwidth(base.cold_bytes(cache))
        return base.Bandwidth(both, both)

    def peak(self, dtype: str) -> float:
        """FLOP/s of cuBLAS's matrix product of this type."""
        return _peak(dtype)

    def peak_bytes(self, load: base.Run, prepare: Callable[[], base.Run]) -> int | None:
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
def _copy_bandwidth(total):
    import torch

    source = torch.ones(max(total // 8, 1), device="cuda")
    target = torch.empty_like(source)
    return total / _seconds(lambda: target.copy_(source))


@functools.cache
def _peak(dtype):
    import torch

    n = 4096
    a = torch.randn(n, n, device="cuda").to(getattr(torch, dtype))
    return 2 * n**3 / _seconds(lambda: a @ a)


def _seconds(function):
    timer = TorchCuda().timer(lambda: [function() for _ in range(CALLS)])
    return base.best_seconds(timer, CALLS)
