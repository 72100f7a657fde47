"""Milliseconds of `involution.compat` and of the same formulas in plain PyTorch.

The candidates run alternately. `inference` is the forward pass, `training` the forward and backward
passes, with the gradients of all inputs. `unfold` copies the windows; `nearest` upsamples the
features and applies the operator with dilation; `shifts` sums shifted sequences.

    KERAS_BACKEND=torch python benchmarks/other_names.py --repeats 15
"""

import argparse
import collections
import statistics
import time

import torch
from torch.nn import functional as F

from involution import compat
from involution.torch.functional import involution


def upsample_flow(flow, up_mask, factor=8):
    """torchvision's formula."""
    batch, channels, *sizes = flow.shape
    weights = up_mask.view(batch, 1, 9, factor, factor, *sizes).softmax(2)
    windows = F.unfold(factor * flow, 3, padding=1).view(batch, channels, 9, 1, 1, *sizes)
    y = (weights * windows).sum(2).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(batch, channels, *(factor * n for n in sizes))


def carafe_unfold(features, masks, kernel_size, factor):
    batch, channels, *sizes = features.shape
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2).view(batch, -1, *sizes)
    windows = F.interpolate(windows, scale_factor=factor, mode="nearest")
    windows = windows.view(batch, channels, kernel_size**2, *masks.shape[2:])
    return (windows * masks[:, None]).sum(2)


def carafe_nearest(features, masks, kernel_size, factor):
    fine = F.interpolate(features, scale_factor=factor, mode="nearest")
    return involution(fine, masks[:, None], kernel_size, dilation=factor)


def headwise_shifts(x, weight, static_w):
    batch, length, _ = x.shape
    heads, taps = weight.shape[2:]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = torch.zeros_like(x)
    for w in range(taps):
        shifted = padded[:, taps - 1 - w : taps - 1 - w + length]
        own = shifted.view(batch, length, heads, -1) * weight[..., w, None]
        y = y + own.view(x.shape) + shifted * static_w[w]
    return y


def lowrank_shifts(x, z, U, static_w):  # noqa: N803 - the name in the formula
    kernel = (z @ U).view(*x.shape[:2], *static_w.shape)
    return headwise_shifts(x, kernel.transpose(2, 3), static_w)


def cases(small):
    """(name, functions by name, inputs)."""
    flow = (1, 2, 7, 9) if small else (1, 2, 55, 128)
    yield (
        f"convex_upsample {flow}, f=8",
        {"compat": compat.convex_upsample, "unfold": upsample_flow},
        [torch.randn(flow), torch.randn(1, 9 * 64, *flow[2:])],
    )
    batch, length, channels = (1, 33, 64) if small else (4, 4096, 2048)
    x, static_w = torch.randn(batch, length, channels), torch.randn(4, channels)
    for heads, label in ((channels, "D"), (channels // 32, "D/32")):
        yield (
            f"headwise {tuple(x.shape)}, W=4, H={label}",
            {"compat": compat.headwise_dynamic_convolution, "shifts": headwise_shifts},
            [x, torch.randn(batch, length, heads, 4), static_w],
        )
    yield (
        f"low-rank {tuple(x.shape)}, W=4, R=15",
        {"compat": compat.lowrank_dynamic_convolution, "shifts": lowrank_shifts},
        [x, torch.randn(batch, length, 15), torch.randn(15, 4 * channels), static_w],
    )
    features = (1, 4, 6, 7) if small else (8, 64, 64, 64)
    for factor in (2, 4):
        functions = {
            "compat": lambda x, masks, u=factor: compat.carafe(x, masks, 5, 1, u),
            "unfold": lambda x, masks, u=factor: carafe_unfold(x, masks, 5, u),
            "nearest": lambda x, masks, u=factor: carafe_nearest(x, masks, 5, u),
        }
        sizes = [factor * n for n in features[2:]]
        masks = torch.randn(features[0], 25, *sizes).softmax(1)
        yield f"carafe {features}, K=5, u={factor}", functions, [torch.randn(features), masks]


def candidate(function, inputs, training):
    def call():
        if training:
            tensors = [t.detach().requires_grad_() for t in inputs]
            function(*tensors).sum().backward()
        else:
            with torch.no_grad():
                function(*inputs)

    return call


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
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check the program")
    arguments = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| case | pass | milliseconds | ratio to compat |")
    print("|---" * 4 + "|")
    for name, functions, inputs in cases(arguments.small):
        first, *others = (function(*inputs) for function in functions.values())
        assert all(torch.allclose(first, y, rtol=1e-3, atol=1e-3) for y in others), name
        for label, training in (("inference", False), ("training", True)):
            calls = {n: candidate(f, inputs, training) for n, f in functions.items()}
            times = measure(calls, arguments.repeats)
            values = ", ".join(f"{n} {t:.2f}" for n, t in times.items())
            ratios = ", ".join(f"{n} {t / times['compat']:.2f}" for n, t in times.items())
            print(f"| {name} | {label} | {values} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
