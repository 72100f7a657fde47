"""RedNet-50's training step at 224 x 224: the largest batch whose process stays within a limit of
memory, and images a second at it.

`chosen` generates kernels where they are used; `native` stores them; `unfold` copies every window.
Each try is a process of its own, which tells its peak; what the framework and the weights take
counts.

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
from rednet import CHOSEN, SIDE, running, unfold
from training import implementation

import involution
from involution import benchmark, files, memory
from involution.ops import api

NETWORKS = (CHOSEN, "native", "unfold")


def tried(name, batch, steps):
    """Peak bytes of the process, and the median seconds of a step."""
    memory.keep_freed()  # as the commands do
    api.IMPLEMENTATIONS += (("unfold", implementation(unfold)),)
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
        for _ in range(steps):
            started = time.perf_counter()
            model.train_on_batch(x, y)
            seconds.append(time.perf_counter() - started)
    # The first one compiles.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, statistics.median(seconds[1:] or seconds)


def attempt(name, batch, steps=2):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, seconds = pool.apply(tried, (name, batch, steps))
    print(f"{name:8} batch {batch:4}: {peak / 2**30:6.2f} GiB, {batch / seconds:6.2f} images/s")
    return peak, seconds


def largest(name, limit):
    """The batch that just fits: memory grows evenly with it, so that a few tries find it."""
    ask = functools.cache(lambda batch: attempt(name, batch)[0])
    low, high = 4, 8
    while True:
        each = (ask(high) - ask(low)) / (high - low)
        guess = max(int(low + (limit - ask(low)) / each), 1)
        if ask(guess) <= limit:
            if ask(guess + 1) > limit:
                return guess
            low, high = guess, guess + 1
        else:
            low, high = max(guess - 1, 1), guess
            if ask(low) <= limit:
                return low
        # Peaks jitter by a few megabytes: neighbours alone would tell no slope.
        low, high = (low, high) if high - low > 2 else (low, low + max(low // 4, 1))


def main(gib=8.0, file=None):
    rows = []
    for name in NETWORKS:
        batch = largest(name, gib * 2**30)
        peak, seconds = attempt(name, batch, steps=5)
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
            files.write_text(file, benchmark.with_setting(rows, list(rows[0])))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 8.0, *sys.argv[2:3])
