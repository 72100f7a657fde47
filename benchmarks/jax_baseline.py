"""The operator on JAX compared with a plain JAX implementation, which XLA compiles poorly.

The plain implementation is shift-and-multiply in both directions; its kernel gradient is summed
over the channels of a group by ``.sum(-1)``. The candidates run alternately.

    KERAS_BACKEND=jax python benchmarks/jax_baseline.py [SECONDS] [FILE.csv]
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import involution
from involution.benchmarking import runner
from involution.benchmarking.timed_program import repeat, tensors
from involution.ops.cases import CASES
from involution.utils import atomic_files

NAMES = ("tut", "red1", "red2", "red3", "red4")


def windows(x, size, sign=1):
    """Shifted, zero-padded copies of ``x`` (B, H, W, ...), one for each tap of the window."""
    half = size // 2
    padded = jnp.pad(x, [(0, 0), (half, half), (half, half)] + [(0, 0)] * (x.ndim - 3))
    height, width = x.shape[1:3]
    for i in range(size):
        for j in range(size):
            a, b = (i, j) if sign > 0 else (size - 1 - i, size - 1 - j)
            yield padded[:, a : a + height, b : b + width]


def grouped(x, groups):
    return x.reshape(*x.shape[:3], groups, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def plain(x, kernel, size, groups):
    shifted = enumerate(windows(grouped(x, groups), size))
    return sum(kernel[:, :, :, t, :, None] * source for t, source in shifted).reshape(x.shape)


def plain_forward(x, kernel, size, groups):
    return plain(x, kernel, size, groups), (x, kernel)


def plain_backward(size, groups, stored, dy):
    x, kernel = stored
    pairs = zip(windows(kernel, size, -1), windows(grouped(dy, groups), size, -1), strict=True)
    dx = sum(k[:, :, :, t, :, None] * d for t, (k, d) in enumerate(pairs)).reshape(x.shape)
    dys = grouped(dy, groups)
    dkernel = [(source * dys).sum(-1) for source in windows(grouped(x, groups), size)]
    return dx, jnp.stack(dkernel, 3)


plain.defvjp(plain_forward, plain_backward)


def measured(case, backward, seconds):
    """Median milliseconds per call, by candidate."""
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(s) for s in (case.x_shape, case.kernel_shape, case.x_shape)]
    *arguments, cotangent = tensors(arrays, "float32")
    candidates = {
        "plain": lambda x, k: plain(x, k, case.window.kernel_size[0], case.window.groups),
        "taps": functools.partial(
            involution.ops.involution, implementation="taps", **case.arguments
        ),
        "native": functools.partial(
            involution.ops.involution, implementation="native", **case.arguments
        ),
        "selected": functools.partial(involution.ops.involution, **case.arguments),
    }
    programs = {
        n: repeat(f, arguments, cotangent if backward else None, 10) for n, f in candidates.items()
    }
    results = {name: run() for name, run in programs.items()}
    for name, values in results.items():
        for value, expected in zip(values, results["plain"], strict=True):
            scale = float(abs(expected).max())
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * scale, err_msg=name)
    times: dict = {name: [] for name in programs}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times["plain"]) < 5:
        for name, run in programs.items():
            run_started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - run_started) * 1e3 / 10)
    return {name: statistics.median(t) for name, t in times.items()}


def main(seconds=5.0, file=None):
    rows = []
    for case in (case for case in CASES if case.name in NAMES):
        for passes, backward in runner.PASSES.items():
            medians = measured(case, backward, seconds)
            for name, ms in medians.items():
                row = {
                    "case": case.name,
                    "candidate": name,
                    "passes": passes,
                    "median_ms": f"{ms:.4g}",
                    "times_plain": f"{medians['plain'] / ms:.3g}",
                }
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    if file is not None:
        atomic_files.write_text(file, runner.with_environment(rows, list(rows[0])))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0, *sys.argv[2:3])
