"""The formula as nested loops in float64 NumPy. It shares no code with the package."""

import numpy as np


def pads(n, kernel, stride, dilation, padding, axis=0):
    """(before, after) for one spatial dimension."""
    reach = (kernel - 1) * dilation
    if padding == "valid":
        return 0, 0
    if padding == "symmetric":
        return reach // 2, reach // 2
    if padding == "same":
        out = -(-n // stride)
        total = max(0, (out - 1) * stride + reach + 1 - n)
        return total // 2, total - total // 2
    return padding[axis]


def output_size(n, kernel, stride, dilation, padding, axis=0):
    before, after = pads(n, kernel, stride, dilation, padding, axis)
    return (n + before + after - (kernel - 1) * dilation - 1) // stride + 1


def involution(x, kernel, kernel_size, strides, padding, dilation_rate, group_layout="contiguous"):
    """channels_last: x (B, *spatial, C), kernel (B, *out, taps, G); tuples for every dimension.

    Returns (y, magnitude): the output, and the sum of |kernel * x|, which bounds rounding errors.
    """
    x, kernel = np.asarray(x, "float64"), np.asarray(kernel, "float64")
    sizes, channels, groups = x.shape[1:-1], x.shape[-1], kernel.shape[-1]
    before = [
        pads(n, k, s, d, padding, i)[0]
        for i, (n, k, s, d) in enumerate(
            zip(sizes, kernel_size, strides, dilation_rate, strict=True)
        )
    ]
    out = [
        output_size(n, k, s, d, padding, i)
        for i, (n, k, s, d) in enumerate(
            zip(sizes, kernel_size, strides, dilation_rate, strict=True)
        )
    ]
    assert list(kernel.shape[1:-2]) == out
    if group_layout == "contiguous":
        group_of = [c // (channels // groups) for c in range(channels)]
    else:
        group_of = [c % groups for c in range(channels)]
    y = np.zeros((x.shape[0], *out, channels))
    magnitude = np.zeros_like(y)
    for p in np.ndindex(*out):
        for tap, k in enumerate(np.ndindex(*kernel_size)):
            q = tuple(
                p[i] * strides[i] - before[i] + k[i] * dilation_rate[i] for i in range(len(sizes))
            )
            if all(0 <= q[i] < sizes[i] for i in range(len(sizes))):
                term = kernel[(slice(None), *p, tap)][:, group_of] * x[(slice(None), *q)]
                y[(slice(None), *p)] += term
                magnitude[(slice(None), *p)] += np.abs(term)
    return y, magnitude
