"""Milliseconds of `involution.torch.Involution2d`, of the Keras layer on PyTorch, and of the module
of the paper's code, which copies the windows by unfold: RedNet's stages, 8 images of 224 x 224.

The candidates run alternately. `inference` is the forward pass, `training` the forward and backward
passes. `call` is the time of the Python code in microseconds: the forward pass of one 4 x 4 image.

    KERAS_BACKEND=torch python benchmarks/torch_modules.py --repeats 15
"""

import argparse
import collections
import statistics
import time

import torch
from torch.nn import functional as F

import involution
from involution.ops.cases import CASES
from involution.torch import Involution2d

STAGES = [case for case in CASES if case.name.startswith("red")]


class Unfold(Involution2d):
    """The paper's module."""

    def forward(self, x):
        window = self.window
        kernel = self.make_kernel_map(x)
        batch, _, *sizes = kernel.shape
        kernel = kernel.view(batch, window.groups, 1, window.taps, *sizes)
        padding = tuple(last // 2 for last in window.last_offset)
        patches = F.unfold(x, window.kernel_size, padding=padding, stride=window.strides)
        patches = patches.view(batch, window.groups, -1, window.taps, *sizes)
        return (kernel * patches).sum(3).view(batch, -1, *sizes)


def candidates(training, channels, groups, batch, sizes):
    """Functions by name: one forward pass, and in training a backward pass."""
    module = Involution2d(channels, groups=groups).train(training)
    unfold = Unfold(channels, groups=groups).train(training)
    unfold.load_state_dict(module.state_dict())
    x = torch.randn(batch, channels, *sizes)
    last = x.contiguous(memory_format=torch.channels_last)
    layer = involution.Involution2D(padding="symmetric", groups=groups)
    layer(last.permute(0, 2, 3, 1))

    def candidate(run, x):
        def call():
            if training:
                run(x.detach().requires_grad_()).sum().backward()
            else:
                with torch.no_grad():
                    run(x)

        return call

    def keras_layer(x):
        return layer(x, training=training)

    return {
        "Involution2d, channels_last": candidate(module, last),
        "Involution2d, contiguous": candidate(module, x),
        "Keras layer": candidate(keras_layer, last.permute(0, 2, 3, 1)),
        "unfold, channels_last": candidate(unfold, last),
        "unfold, contiguous": candidate(unfold, x),
    }


def measure(calls, repeats):
    """The median time of each call in milliseconds."""
    times = collections.defaultdict(list)
    for step in range(repeats + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if step >= 2:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    tiny = candidates(False, 16, 1, 1, (4, 4))
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| case | pass | " + " | ".join(tiny) + " |")
    print("|---" * (2 + len(tiny)) + "|")

    def row(case, label, times, scale=1.0, digits=1):
        values = " | ".join(f"{scale * times[name]:.{digits}f}" for name in tiny)
        print(f"| {case} | {label} | {values} |", flush=True)

    row("4 x 4", "call, µs", measure(tiny, 40 * repeats), 1000, 0)
    for case in STAGES:
        for label, training in (("inference", False), ("training", True)):
            calls = candidates(training, case.channels, case.window.groups, case.batch, case.sizes)
            row(case.name, label, measure(calls, repeats))


if __name__ == "__main__":
    main()
