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
        kernel = self._kernel_map(x)
        batch, _, *sizes = kernel.shape
        kernel = kernel.view(batch, window.groups, 1, window.taps, *sizes)
        padding = tuple(last // 2 for last in window.last_offset)
        patches = F.unfold(x, window.kernel_size, padding=padding, stride=window.strides)
        patches = patches.view(batch, window.groups, -1, window.taps, *sizes)
        return (kernel * patches).sum(3).view(batch, -1, *sizes)


def candidates(channels, groups, batch, sizes):
    """Functions by name: `call(training)` is one forward pass, and a backward pass in training."""
    module = Involution2d(channels, groups=groups)
    unfold = Unfold(channels, groups=groups)
    unfold.load_state_dict(module.state_dict())
    x = torch.randn(batch, channels, *sizes)
    last = x.contiguous(memory_format=torch.channels_last)
    layer = involution.Involution2D(padding="symmetric", groups=groups)
    layer(last.permute(0, 2, 3, 1))

    def candidate(x, run):
        def call(training):
            if training:
                run(x.detach().requires_grad_(), True).sum().backward()
            else:
                with torch.no_grad():
                    run(x, False)

        return call

    def plain(model, x):
        return candidate(x, lambda x, training: model.train(training)(x))

    return {
        "Involution2d, channels_last": plain(module, last),
        "Involution2d, contiguous": plain(module, x),
        "Keras layer": candidate(
            last.permute(0, 2, 3, 1), lambda x, training: layer(x, training=training)
        ),
        "unfold, channels_last": plain(unfold, last),
        "unfold, contiguous": plain(unfold, x),
    }


def measure(calls, training, repeats):
    """The median time of each call in milliseconds."""
    times = collections.defaultdict(list)
    for step in range(repeats + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call(training)
            if step >= 2:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    names = list(candidates(16, 1, 1, (4, 4)))
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| case | pass | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|")

    def row(case, label, times, scale=1.0, digits=1):
        values = " | ".join(f"{scale * times[name]:.{digits}f}" for name in names)
        print(f"| {case} | {label} | {values} |", flush=True)

    tiny = candidates(16, 1, 1, (4, 4))
    row("4 x 4", "call, µs", measure(tiny, False, 40 * repeats), 1000, 0)
    for case in STAGES:
        calls = candidates(case.channels, case.window.groups, case.batch, case.sizes)
        row(case.name, "inference", measure(calls, False, repeats))
        row(case.name, "training", measure(calls, True, repeats))


if __name__ == "__main__":
    main()
