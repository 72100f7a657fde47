"""JAX's first CUDA device.

It is timed by the wall clock around a compiled program, which includes its launch: the more calls
a program has, the smaller the share.
"""

import functools
from collections.abc import Callable

from involution.benchmarking import timed_program
from involution.benchmarking.devices import base

CALLS = 20


class JaxCuda:
    """JAX's first CUDA device, timed by the wall clock."""

    name = "cuda"
    keras_name = "gpu"
    # JAX does not reset the peak of a process.
    measures_memory_in_subprocess = True

    def unavailable_reason(self) -> str | None:
        import jax

        try:
            jax.devices("cuda")
        except RuntimeError:
            return "no CUDA device is available"
        return None

    def description(self) -> str:
        import jax

        (device, *_) = jax.devices("cuda")
        version, *_ = device.client.platform_version.splitlines()
        return f"{device.device_kind}, {version}"

    def timer(self, run: base.Run) -> Callable[[], float]:
        """A function that calls ``run`` and returns the seconds it took."""
        return base.wall_clock(run)

    def copy_bandwidth(self, total: int) -> float:
        """Warm: bytes per second, read plus written, of repeated negations of half of ``total``
        bytes; if the bytes fit into the L2 cache, it is the cache's bandwidth."""
        return _copy_bandwidth(total)

    def memory_bandwidth(self) -> base.Bandwidth:
        """Cold: bytes per second of negations of ``base.DRAM_BYTES`` in device memory, reads and
        writes at one rate; L2 caches of up to a quarter of it hold little of them."""
        both = _copy_bandwidth(base.DRAM_BYTES)
        return base.Bandwidth(both, both)

    def peak(self, dtype: str) -> float:
        """FLOP/s of the matrix product of this type, float32 without TensorFloat-32."""
        return _peak(dtype)

    def peak_bytes(self, load: base.Run, prepare: Callable[[], base.Run]) -> int | None:
        """Peak device memory of the prepared run and its arguments.

        JAX cannot reset a peak, so the call needs a new process, and ``load``, which runs first,
        must allocate less than the run. The parent process must not preallocate the device's
        memory (``XLA_PYTHON_CLIENT_PREALLOCATE=false``), or the new one has none.
        """
        import jax

        (device, *_) = jax.devices("cuda")
        load()
        before = device.memory_stats()["bytes_in_use"]
        prepare()()
        return device.memory_stats()["peak_bytes_in_use"] - before


@functools.cache
def _copy_bandwidth(total):
    import jax.numpy as jnp

    return total / _seconds(jnp.negative, [jnp.ones(max(total // 8, 1), "float32")])


@functools.cache
def _peak(dtype):
    import jax
    import jax.numpy as jnp

    n = 4096
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    product = functools.partial(jnp.matmul, precision="highest")
    return 2 * n**3 / _seconds(product, [a, a])


def _seconds(function, arguments):
    timer = base.wall_clock(timed_program.repeat(function, arguments, calls=CALLS))
    timer()  # compiles
    return base.best_seconds(timer, CALLS)
