"""VOLO's outlook attention as one involution."""

import itertools
from typing import Any

from involution import ops
from involution.compat.operands import check_divisible, check_shape, integer, operands, shape_of
from involution.ops.frameworks import namespace
from involution.ops.window import ceil_div


def outlook_attention(
    value: Any,
    attention: Any,
    kernel_size: int = 3,
    padding: int = 1,
    stride: int = 1,
) -> Any:
    """VOLO's outlook attention after its softmax: windows are mixed, and added where they overlap.

    The window of place p has the positions stride * p - padding + i, for K * K offsets i. With
    ``value`` 0 out of bounds,

        y[n, q] = sum over p, i with stride * p - padding + i = q of
            sum over j of attention[n, head, p, i, j] * value[n, stride * p - padding + j]

    In PyTorch: ``F.fold(attention @ unfold(value))``. It is one involution with a window of
    (2 * K - 1) squared taps and a group for each head: its kernel at q and offset d is the sum of
    ``attention[n, head, p, i, i + d]`` over the places p whose window contains q. Windows of values
    are not copied.

    Args:
        value: Tensor (N, H, W, C): float64, float32, bfloat16 or float16.
        attention: Tensor (N, heads, h * w, K * K, K * K) of the dtype of ``value``, where h =
            floor((H + 2 * padding - K) / stride) + 1, as w: for the default arguments ceil(H /
            stride). ``heads`` divides C; heads are contiguous.
        kernel_size: Integer K.
        padding: Integer, zeros on each side.
        stride: Integer.

    Returns:
        Tensor (N, H, W, C), of the dtype of ``value``: what VOLO passes to its last projection.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import outlook_attention
    >>> value = np.ones((1, 5, 7, 8), "float32")
    >>> attention = np.full((1, 2, 3 * 4, 9, 9), 1 / 9, "float32")
    >>> y = outlook_attention(value, attention, stride=2)
    >>> tuple(y.shape), round(float(y[0, 2, 2, 0]), 4)
    ((1, 5, 7, 8), 1.0)

    Source: Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", TPAMI 2022,
    arXiv:2106.13112.
    """
    value, attention = operands(value=value, attention=attention)
    size, stride = integer("kernel_size", kernel_size), integer("stride", stride)
    padding = integer("padding", padding, minimum=0)
    batch, *sizes, channels = shape_of("value", value, "N, H, W, C")
    _, heads, *_ = shape_of("attention", attention, "N, heads, h * w, K * K, K * K")

    def places(n):
        return (n + 2 * padding - size) // stride + 1

    known = None not in sizes
    if known and min(map(places, sizes)) < 1:
        raise ValueError(
            "The window must fit into the padded value. "
            f"Received: value.shape={(batch, *sizes, channels)}, kernel_size={size}, "
            f"padding={padding}"
        )
    count = places(sizes[0]) * places(sizes[1]) if known else None
    check_shape(
        "attention",
        attention,
        (batch, heads, count, size**2, size**2),
        "N, heads, h * w, K * K, K * K",
    )
    check_divisible("value", channels, "heads", heads)
    array = namespace(value)
    batch, height, width, _ = array.shape(value)
    shape = (batch, heads, places(height), places(width), size**4)
    kernel = _summed(array.reshape(attention, shape), (height, width), size, padding, stride)
    return ops.involution(
        value,
        kernel,
        2 * size - 1,
        padding="symmetric",
        groups=heads,
        data_format="channels_last",
    )


def _summed(matrices, sizes, size, padding, stride):
    """The kernels (N, H, W, taps, heads) of matrices (N, heads, h, w, K * K * K * K)."""
    array = namespace(matrices)
    # Sums of contiguous rows of an image are faster than of pairs of taps.
    matrices = array.moveaxis(matrices, -1, 1)
    counts = [ceil_div(n, stride) for n in sizes]
    # Bounds that do not depend on the sizes, which may be known at run time only.
    before = max(0, ceil_div(size - 1 - padding, stride))
    after = (stride - 1 + padding) // stride + max(0, ceil_div(size - 1 - 2 * padding, stride))
    matrices = array.pad(matrices, [(0, 0)] * 3 + [(before, after)] * 2)
    offsets = list(itertools.product(range(size), repeat=2))

    def shifted(tap, first):
        """One entry of the matrices at the places whose index exceeds the phase's by ``first``."""
        rows, columns = (
            slice(before + f, before + f + n) for f, n in zip(first, counts, strict=True)
        )
        return matrices[:, tap, :, rows, columns]

    def kernel_of(phase):
        """The kernels of the positions stride * m + phase."""
        terms: dict[tuple, list] = {
            tap: [] for tap in itertools.product(range(2 * size - 1), repeat=2)
        }
        for i, j in itertools.product(range(size**2), repeat=2):
            distances = [r + padding - o for r, o in zip(phase, offsets[i], strict=True)]
            if all(d % stride == 0 for d in distances):
                tap = tuple(b - a + size - 1 for a, b in zip(offsets[i], offsets[j], strict=True))
                first = [d // stride for d in distances]
                terms[tap].append(shifted(i * size**2 + j, first))
        zeros = array.zeros_like(shifted(0, (0, 0)))
        return array.stack(
            [sum(values[1:], values[0]) if values else zeros for values in terms.values()], 1
        )

    phases = [array.stack([kernel_of((a, b)) for b in range(stride)], -1) for a in range(stride)]
    kernel = array.stack(phases, 4)
    batch, taps, heads = array.shape(kernel)[:3]
    kernel = array.reshape(kernel, (batch, taps, heads, *(n * stride for n in counts)))
    kernel = kernel[:, :, :, : sizes[0], : sizes[1]]
    return array.moveaxis(array.moveaxis(kernel, 1, -1), 1, -1)
