"""Throughput of RedNet-50, of Keras's ResNet-50, and of RedNet-50 with involution by unfold: images
per second at 224 x 224 in batches of 8; and the time of each kind of layer (--layers).

`selected` is the default, which fuses kernel generation; `native` stores kernels; `unfold` is
im2col; `free` has a no-op operator, an upper bound. The networks run alternately, one step each.

    KERAS_BACKEND=tensorflow python benchmarks/rednet.py --steps 15 --output FILE.csv
"""

import argparse
import collections
import contextlib
import functools
import pathlib
import statistics
import time

import keras
import numpy as np
from training import free, implementation

import involution
from involution.benchmarking import baselines, runner
from involution.ops import dispatch
from involution.utils import atomic_files, memory

SIDE = 224
SLOW = ("unfold",)
SELECTED, RESNET = "selected", "resnet50"
NETWORKS = (SELECTED, "native", "free", *SLOW, RESNET)


def unfold(x, kernel, problem):
    pads = problem.window.pads(x.shape[1:3])
    return baselines.im2col(x, kernel, problem.window, pads)


def networks(names):
    models = {}
    for name in names:
        keras.utils.set_random_seed(0)
        if name == RESNET:
            models[name] = keras.applications.ResNet50(weights=None, classifier_activation=None)
        else:
            models[name] = involution.models.RedNet50((SIDE, SIDE, 3))
    for model in models.values():
        model.compile(
            keras.optimizers.SGD(1e-4, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # XLA's convolutions are slower than TensorFlow's on CPUs.
            jit_compile=keras.config.backend() == "jax",
        )
    return models


def steps(models, x, y, count):
    """Seconds of each step, by (pass, network)."""
    times = collections.defaultdict(list)
    passes = {
        "inference": lambda model: model.predict_on_batch(x),
        "training": lambda model: model.train_on_batch(x, y),
    }
    for label, run in passes.items():
        for step in range(count + 2):
            for name, model in models.items():
                if name in SLOW and step > 3:
                    continue
                with running(name):
                    started = time.perf_counter()
                    run(model)
                    if step >= 2:
                        times[label, name].append(time.perf_counter() - started)
    return times


def running(name):
    """Context manager that forces the implementation with this name."""
    if name in (SELECTED, RESNET):
        return contextlib.nullcontext()
    return involution.ops.use(name)


def check(models, x):
    """Compares the outputs of all implementations."""
    results = []
    for name in models:
        if name not in ("free", RESNET):
            with running(name):
                results.append(keras.ops.convert_to_numpy(models[name](x[:1], training=False)))
    for result in results[1:]:
        assert np.abs(results[0] - result).max() <= 1e-4 * np.abs(results[0]).max()


def kind(layer):
    if isinstance(layer, keras.layers.Conv2D):
        return f"convolution {'x'.join(map(str, layer.kernel_size))}"
    return type(layer).__name__


def layer_times(model, batch, seconds=0.2):
    """Milliseconds of inference by kind of layer, each layer timed separately."""
    totals, counts = collections.Counter(), collections.Counter()
    cache: dict[tuple, float] = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        key = (kind(layer), *shapes(layer, batch), layer.output.shape)
        if key not in cache:
            cache[key] = timed(compiled_call(layer, batch), seconds)
        totals[kind(layer)] += cache[key]
        counts[kind(layer)] += 1
    return {name: (counts[name], ms) for name, ms in totals.most_common()}


def shapes(layer, batch):
    return [(batch, *t.shape[1:]) for t in keras.tree.flatten(layer.input)]


def compiled_call(layer, batch):
    random = np.random.default_rng(0)
    inputs = [
        keras.ops.convert_to_tensor(random.random(shape, "float32"))
        for shape in shapes(layer, batch)
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


def main(options):
    memory.disable_malloc_trim()  # as the commands do
    added = {"unfold": implementation(unfold), "free": implementation(free)}
    dispatch.IMPLEMENTATIONS.update(added)
    keras.config.set_dtype_policy(options.dtype_policy)
    random = np.random.default_rng(0)
    x = random.random((options.batch, SIDE, SIDE, 3), "float32")
    y = random.integers(0, 1000, options.batch)
    models = networks(options.networks.split(","))
    if options.dtype_policy == "float32":
        check(models, x)
    times = steps(models, x, y, options.steps)
    rows = []
    for (label, name), seconds in times.items():
        rate = options.batch / statistics.median(seconds)
        selected = options.batch / statistics.median(times[label, SELECTED])
        rows.append(
            {
                "what": label,
                "dtype_policy": options.dtype_policy,
                "batch": options.batch,
                "network": name if name == RESNET else f"rednet50, {name}",
                "images_per_s": f"{rate:.2f}",
                "rednet50_is_times": f"{selected / rate:.2f}",
            }
        )
        print(
            f"{label:10} {rows[-1]['network']:18} {rate:8.2f} images/s; "
            f"rednet50 {selected / rate:.2f}x"
        )
    for name in (SELECTED, RESNET) if options.layers else ():
        for layers, (number, ms) in layer_times(models[name], options.batch).items():
            rows.append({"what": "layers", "network": name, "layers": layers})
            rows[-1] |= {"number": number, "ms": f"{ms:.1f}"}
            print(f"{name:10} {number:4} {layers:24} {ms:8.1f} ms")
    if options.output is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        rows = [dict.fromkeys(columns, "") | row for row in rows]
        atomic_files.write_text(
            options.output, runner.with_environment(rows, columns, options.device)
        )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--dtype-policy", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", action="store_true", help="also time each kind of layer")
    parser.add_argument("--output", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
