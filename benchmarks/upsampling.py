"""Milliseconds and peak memory of upsampling, against the same result by other means.

`upsampling` is `involution.ops.involution(..., upsampling=u)`; `nearest` upsamples the input and
applies the operator with dilation; `unfold` copies the windows and multiplies them. Each computes
the output and both gradients of a tensor (8, 64, 64, 64) with 5x5 windows, compiled as the backend
usually is (`jax.jit`, `tf.function`). The candidates run alternately. Memory is measured in a
process for each candidate, from before the inputs exist, relative to the inputs, the output, its
gradient and the two gradients.

    KERAS_BACKEND=torch python benchmarks/upsampling.py
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
from keras import ops

from involution.ops import involution

BACKEND = keras.config.backend()
K = 5


def upsampling(x, kernel, u):
    return involution(x, kernel, K, upsampling=u)


def nearest(x, kernel, u):
    fine = ops.repeat(ops.repeat(x, u, 1), u, 2)
    return involution(fine, kernel, K, padding="symmetric", dilation_rate=u)


def unfold(x, kernel, u):
    """The windows as a tensor (B, H, W, 1, taps, C)."""
    batch, height, width, channels = x.shape
    pad = K // 2
    padded = ops.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = ops.stack(
        [padded[:, i : i + height, j : j + width] for i in range(K) for j in range(K)], 3
    )
    kernel = ops.reshape(kernel, (batch, height, u, width, u, K * K))
    kernel = ops.reshape(
        ops.transpose(kernel, (0, 1, 3, 2, 4, 5)), (batch, height, width, u * u, K * K, 1)
    )
    y = ops.sum(ops.expand_dims(windows, 3) * kernel, axis=-2)
    y = ops.reshape(y, (batch, height, width, u, u, channels))
    y = ops.transpose(y, (0, 1, 3, 2, 4, 5))
    return ops.reshape(y, (batch, height * u, width * u, channels))


CANDIDATES = {"upsampling": upsampling, "nearest": nearest, "unfold": unfold}


def step(function, u):
    """A function of (x, kernel, dy): the output and both gradients."""
    if BACKEND == "torch":
        import torch

        def run(x, kernel, dy):
            x, kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
            y = function(x, kernel, u)
            return y.detach(), *torch.autograd.grad(y, (x, kernel), dy)

        return run
    if BACKEND == "jax":
        import jax

        def run(x, kernel, dy):
            y, pullback = jax.vjp(lambda a, b: function(a, b, u), x, kernel)
            return y, *pullback(dy)

        compiled = jax.jit(run)
        return lambda *arguments: jax.block_until_ready(compiled(*arguments))
    import tensorflow as tf

    @tf.function
    def run(x, kernel, dy):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = function(x, kernel, u)
        return y, *tape.gradient(y, (x, kernel), dy)

    return run


def tensors(u, batch):
    rng = np.random.default_rng(0)
    shapes = (batch, 64, 64, 64), (batch, 64 * u, 64 * u, K * K, 1), (batch, 64 * u, 64 * u, 64)
    return [ops.convert_to_tensor(rng.random(shape, "float32")) for shape in shapes]


def status(field):
    with pathlib.Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_memory(name, u):
    """Peak bytes of a step, from before the inputs exist, and the bytes of all tensors."""
    run = step(CANDIDATES[name], u)
    # Programs are compiled, and the framework's own memory is allocated, before. The shapes differ
    # in the batch, so that no memory of this size is kept.
    run(*tensors(u, 1))
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    arguments = tensors(u, 8)
    results = run(*arguments)
    size = sum(int(np.prod(t.shape)) * 4 for t in (*arguments, *results))
    return status("VmHWM") - before, size


def measure(u, repeats):
    arguments = tensors(u, 8)
    calls = {name: step(function, u) for name, function in CANDIDATES.items()}
    results = {name: call(*arguments) for name, call in calls.items()}
    for name, found in results.items():
        for value, expected in zip(found, results["upsampling"], strict=True):
            difference = np.abs(np.asarray(value) - np.asarray(expected)).max()
            assert difference < 1e-4 * np.abs(np.asarray(expected)).max(), name
    del results
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call(*arguments)  # the memory that the previous candidate returned must be mapped again
            started = time.perf_counter()
            call(*arguments)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs=2, help="measure one candidate's memory: name and factor")
    arguments = parser.parse_args()
    if arguments.memory:
        print(*peak_memory(arguments.memory[0], int(arguments.memory[1])))
        return
    print("| backend | u | candidate | milliseconds | ratio | peak memory / tensors |")
    print("|---" * 6 + "|")
    for u in (2, 4):
        times = measure(u, arguments.repeats)
        for name, milliseconds in times.items():
            command = [sys.executable, __file__, "--memory", name, str(u)]
            output = subprocess.check_output(command, text=True)  # noqa: S603 - this file
            peak, size = map(int, output.split()[-2:])
            print(
                f"| {BACKEND} | {u} | {name} | {milliseconds:.1f} | "
                f"{milliseconds / times['upsampling']:.1f} | {peak / size:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
