"""The largest batch of a RedNet-50 training step at 224 x 224 within a memory limit, and its
throughput.

`selected` is the default, which fuses kernel generation; `native` stores kernels; `unfold` is
im2col. Each batch size runs in its own process; peak memory includes the framework and the weights.

    KERAS_BACKEND=torch python benchmarks/largest_batch.py [GIB] [FILE.csv]
"""

import functools
import multiprocessing
import resource
import statistics
import sys
import time

import keras
import numpy as np
from rednet import SELECTED, SIDE, running, unfold
from training import implementation

import involution
from involution.benchmarking import runner
from involution.ops import dispatch
from involution.utils import atomic_files, memory

NETWORKS = (SELECTED, "native", "unfold")
STEPS = 4


def train(name, batch):
    """Peak bytes of this process, and the median seconds of a step."""
    memory.disable_malloc_trim()  # as the commands do
    dispatch.IMPLEMENTATIONS["unfold"] = implementation(unfold)
    random = np.random.default_rng(0)
    x = random.random((batch, SIDE, SIDE, 3), "float32")
    y = random.integers(0, 1000, batch)
    keras.utils.set_random_seed(0)
    model = involution.models.RedNet50((SIDE, SIDE, 3))
    model.compile(
        keras.optimizers.SGD(1e-4, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.config.backend() == "jax",
    )
    seconds = []
    with running(name):
        for _ in range(STEPS):
            started = time.perf_counter()
            model.train_on_batch(x, y)
            seconds.append(time.perf_counter() - started)
    # The first step compiles.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, statistics.median(seconds[1:])


@functools.cache
def attempt(name, batch):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, seconds = pool.apply(train, (name, batch))
    print(
        f"{name:8} batch {batch:4}: {peak / 2**30:6.2f} GiB, {batch / seconds:6.2f} images/s",
        flush=True,
    )
    return peak, seconds


def largest(name, limit):
    """The largest batch that fits, extrapolated: memory is linear in the batch."""

    def fits(batch):
        return attempt(name, batch)[0] <= limit

    low, high = (attempt(name, batch)[0] for batch in (4, 8))
    batch = max(int(4 + (limit - low) / ((high - low) / 4)), 1)
    while batch > 1 and not fits(batch):
        batch -= 1
    while fits(batch + 1):
        batch += 1
    return batch


def main(gib=8.0, file=None):
    rows = []
    for name in NETWORKS:
        batch = largest(name, gib * 2**30)
        peak, seconds = attempt(name, batch)
        rows.append(
            {
                "network": f"rednet50, {name}",
                "limit_gib": gib,
                "batch": batch,
                "peak_gib": f"{peak / 2**30:.2f}",
                "images_per_s": f"{batch / seconds:.2f}",
            }
        )
        print(*rows[-1].values())
        if file is not None:
            atomic_files.write_text(file, runner.with_environment(rows, list(rows[0])))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 8.0, *sys.argv[2:3])
