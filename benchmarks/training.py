"""Training steps of the keras.io example's involutional network by implementation.

Baselines are `im2col`, the example's algorithm, and `free`, a no-op operator: the upper bound of a
faster one. The models run alternately, one step each.

    KERAS_BACKEND=tensorflow python benchmarks/training.py [STEPS] [FILE.csv]
"""

import statistics
import sys
import time
import types

import keras
import numpy as np

import involution
from involution.benchmarking import baselines, runner
from involution.ops import dispatch
from involution.utils import atomic_files, memory

BATCH = 256


def im2col(x, kernel, problem):
    return baselines.im2col(x, kernel, problem.window)


def free(x, kernel, problem):
    # All gradients exist, at the lowest possible cost.
    stride = problem.window.strides[0]
    return x[:, ::stride, ::stride] * keras.ops.mean(kernel)


def implementation(apply):
    return types.SimpleNamespace(unsupported_reason=lambda problem: None, apply=apply)


def main(steps=30, file=None):
    memory.disable_malloc_trim()  # as the commands do
    added = {"im2col": implementation(im2col), "free": implementation(free)}
    dispatch.IMPLEMENTATIONS.update(added)
    random = np.random.default_rng(0)
    x = random.random((BATCH, 32, 32, 3), "float32")
    y = random.integers(0, 10, BATCH)
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    models, times = {}, {}
    for name in ("native", "taps", "im2col", "free", "cnn"):
        keras.utils.set_random_seed(0)
        model = involution.models.cnn() if name == "cnn" else involution.models.inn()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        models[name], times[name] = model, []
    for step in range(steps + 3):
        for name, model in models.items():
            with involution.ops.use("taps" if name == "cnn" else name):
                started = time.perf_counter()
                model.train_on_batch(x, y)
                if step >= 3:
                    times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    rows = [
        {
            "model": "cnn" if name == "cnn" else f"inn, {name}",
            "ms_per_step": f"{ms:.2f}",
            "x_im2col": "" if name == "cnn" else f"{medians['im2col'] / ms:.2f}",
        }
        for name, ms in medians.items()
    ]
    for row in rows:
        print(f"{row['model']:14}{row['ms_per_step']:>9} ms per step of {BATCH}", row["x_im2col"])
    if file is not None:
        atomic_files.write_text(file, runner.with_environment(rows, list(rows[0])))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, *sys.argv[2:3])
