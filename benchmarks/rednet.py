"""RedNet-50 beside Keras's ResNet-50, and beside RedNet-50 with involution by unfold: images a
second at 224 x 224 in batches of 8, and what the layers of both networks take alone.

`chosen` is RedNet-50 as it runs unasked, its kernels generated where they are used; `native` stores
them. `free` has an operator that costs nothing. The networks take turns, a step each.

    KERAS_BACKEND=tensorflow python benchmarks/rednet.py [STEPS] [FILE.csv]
"""

import collections
import contextlib
import functools
import statistics
import sys
import time

import keras
import numpy as np
from training import free, implementation

import involution
from involution import benchmark, files, memory, yardsticks
from involution.ops import api

BATCH, SIDE = 8, 224
SLOW = ("unfold",)
CHOSEN = "chosen"


def unfold(x, kernel, problem):
    g = problem.geometry
    (kernel_size,), (strides,) = set(g.kernel_size), set(g.strides)
    pads = g.pads(x.shape[1:3])
    return yardsticks.patches(x, kernel, kernel_size, strides, 1, g.groups, g.group_layout, pads)


def networks():
    """Name: (the implementation of involution that it runs with, the network)."""
    made = {}
    for name in (CHOSEN, "native", "free", *SLOW):
        keras.utils.set_random_seed(0)
        made[name] = involution.models.RedNet50((SIDE, SIDE, 3))
    keras.utils.set_random_seed(0)
    made["resnet50"] = keras.applications.ResNet50(weights=None, classifier_activation=None)
    for model in made.values():
        model.compile(
            keras.optimizers.SGD(1e-4, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # TensorFlow's own operations: its compiler's convolutions are slower on CPUs.
            jit_compile=keras.config.backend() == "jax",
        )
    return made


def steps(made, x, y, count):
    """Seconds of each step, by (pass, network)."""
    times = collections.defaultdict(list)
    passes = {
        "inference": lambda model: model.predict_on_batch(x),
        "training": lambda model: model.train_on_batch(x, y),
    }
    for label, run in passes.items():
        for step in range(count + 2):
            for name, model in made.items():
                if name in SLOW and step > 3:
                    continue
                with running(name):
                    started = time.perf_counter()
                    run(model)
                    if step >= 2:
                        times[label, name].append(time.perf_counter() - started)
    return times


def running(name):
    """Where a network runs as its name says."""
    if name in (CHOSEN, "resnet50"):
        return contextlib.nullcontext()
    return involution.ops.use(name)


def check(made, x):
    """Unfold computes what the kernels of this package do."""
    results = []
    for name in ("native", CHOSEN, "unfold"):
        with running(name):
            results.append(keras.ops.convert_to_numpy(made[name](x[:1], training=False)))
    for result in results[1:]:
        assert np.abs(results[0] - result).max() <= 1e-4 * np.abs(results[0]).max()


def kind(layer):
    if isinstance(layer, keras.layers.Conv2D):
        return f"convolution {'x'.join(map(str, layer.kernel_size))}"
    return type(layer).__name__


def alone(model, seconds=0.2):
    """Milliseconds of inference for each kind of layer, every layer run alone."""
    totals, counts = collections.Counter(), collections.Counter()
    known: dict[tuple, float] = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        same = (kind(layer), *shapes(layer), layer.output.shape)
        if same not in known:
            known[same] = timed(single(layer), seconds)
        totals[kind(layer)] += known[same]
        counts[kind(layer)] += 1
    return {name: (counts[name], ms) for name, ms in totals.most_common()}


def shapes(layer):
    return [(BATCH, *t.shape[1:]) for t in keras.tree.flatten(layer.input)]


def single(layer):
    random = np.random.default_rng(0)
    inputs = [
        keras.ops.convert_to_tensor(random.random(shape, "float32")) for shape in shapes(layer)
    ]
    call = functools.partial(layer, inputs[0] if len(inputs) == 1 else inputs)
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(call, autograph=False)
    if backend == "torch":
        import torch

        return torch.no_grad()(call)
    import jax

    compiled = jax.jit(call)
    return lambda: compiled().block_until_ready()


def timed(run, seconds):
    times = []
    for _ in range(3):
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def main(count=15, file=None):
    memory.keep_freed()  # as the commands do
    api.IMPLEMENTATIONS += (("unfold", implementation(unfold)), ("free", implementation(free)))
    random = np.random.default_rng(0)
    x = random.random((BATCH, SIDE, SIDE, 3), "float32")
    y = random.integers(0, 1000, BATCH)
    made = networks()
    check(made, x)
    times = steps(made, x, y, count)
    rows = []
    for (label, name), seconds in times.items():
        rate = BATCH / statistics.median(seconds)
        own = BATCH / statistics.median(times[label, CHOSEN])
        rows.append(
            {
                "what": label,
                "network": name if name == "resnet50" else f"rednet50, {name}",
                "images_per_s": f"{rate:.2f}",
                "rednet50_is_times": f"{own / rate:.2f}",
            }
        )
        print(
            f"{label:10} {rows[-1]['network']:18} {rate:8.2f} images/s; rednet50 {own / rate:.2f}x"
        )
    for name in (CHOSEN, "resnet50"):
        for layers, (number, ms) in alone(made[name]).items():
            rows.append({"what": "layers alone", "network": name, "layers": layers})
            rows[-1] |= {"number": number, "ms": f"{ms:.1f}"}
            print(f"{name:10} {number:4} {layers:24} {ms:8.1f} ms")
    if file is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        rows = [dict.fromkeys(columns, "") | row for row in rows]
        files.write_text(file, benchmark.with_setting(rows, columns))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15, *sys.argv[2:3])
