"""Windows of images: SKA, FeatUp's adaptive convolution, and CSPN's propagation."""

from typing import Any

from involution import ops
from involution.compat.grouped import by_groups
from involution.compat.operands import check_divisible, check_shape, integer, operands, shape_of
from involution.ops.frameworks import namespace
from involution.ops.validation import static_shape


def ska(x: Any, w: Any) -> Any:
    """LSNet's small-kernel aggregation: an involution with interleaved groups.

        y[n, c, i, j] = sum over taps k of
            w[n, c % C', k, i, j] * x[n, c, window of (i, j) at k]

    where ``x`` is 0 out of bounds and the window has its center at (i, j).

    Differences from LSNet's code: windows are of any odd size, and it also runs on CPUs, on
    tensors of TensorFlow and JAX, and for any C that C' divides.

    Args:
        x: Tensor (N, C, H, W): float64, float32, bfloat16 or float16.
        w: Tensor (N, C', K * K, H, W), of the dtype of ``x``; C' divides C, and K is odd.

    Returns:
        Tensor (N, C, H, W), of the dtype of ``x``.

    Raises:
        ValueError: The shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import ska
    >>> y = ska(np.ones((1, 8, 4, 5), "float32"), np.ones((1, 2, 9, 4, 5), "float32"))
    >>> tuple(y.shape), float(y[0, 0, 0, 0]), float(y[0, 0, 1, 1])
    ((1, 8, 4, 5), 4.0, 9.0)

    Source: Wang et al., "LSNet: See Large, Focus Small", CVPR 2025, arXiv:2503.23135.
    """
    x, w = operands(x=x, w=w)
    batch, channels, *sizes = shape_of("x", x, "N, C, H, W")
    axes = "N, C', K * K, H, W"
    _, groups, taps, *_ = shape_of("w", w, axes)
    size = round(taps**0.5) if taps else 0
    if size % 2 == 0 or size**2 != taps:
        raise ValueError(
            "The number of taps of `w` must be the square of an odd integer. "
            f"Received: w.shape={static_shape('w', w)}"
        )
    check_shape("w", w, (batch, groups, taps, *sizes), axes)
    check_divisible("x", channels, "C'", groups)
    # The groups as a spatial dimension: ``x`` is not copied, and vectors are along rows.
    array = namespace(x)
    batch, _, height, width = array.shape(x)
    y = ops.involution(
        array.reshape(x, (batch, channels // groups, groups, height, width)),
        array.expand_dims(array.swapaxes(w, 1, 2), 2),
        (1, size, size),
        padding="symmetric",
        data_format="channels_first",
    )
    return array.reshape(y, (batch, channels, height, width))


def adaptive_conv(input: Any, filters: Any) -> Any:
    """FeatUp's ``AdaptiveConv.apply``: a kernel for each position, shared by all channels.

        y[n, c, i, j] = sum over a, b of filters[n, i, j, a, b] * input[n, c, i + a, j + b]

    There is no padding: FeatUp reflects its images before. Differences from FeatUp's code: windows
    may have unequal sides, and it needs no compiler at run time.

    Args:
        input: Tensor (N, C, H + F1 - 1, W + F2 - 1): float64, float32, bfloat16 or float16.
        filters: Tensor (N, H, W, F1, F2), of the dtype of ``input``.

    Returns:
        Tensor (N, C, H, W), of the dtype of ``input``.

    Raises:
        ValueError: The shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import adaptive_conv
    >>> image = np.arange(20, dtype="float32").reshape(1, 1, 4, 5)
    >>> y = adaptive_conv(image, np.ones((1, 2, 3, 3, 3), "float32"))
    >>> tuple(y.shape), float(y[0, 0, 0, 0])
    ((1, 1, 2, 3), 54.0)

    Source: Fu et al., "FeatUp: A Model-Agnostic Framework for Features at Any Resolution", ICLR
    2024, arXiv:2403.10516.
    """
    input, filters = operands(input=input, filters=filters)
    axes = "N, H, W, F1, F2"
    batch, channels, *padded = shape_of("input", input, "N, C, H + F1 - 1, W + F2 - 1")
    *_, rows, columns = shape_of("filters", filters, axes)
    if not rows or not columns:
        raise ValueError(
            "The sizes F1 and F2 of `filters` must be known and not 0. "
            f"Received: filters.shape={static_shape('filters', filters)}"
        )
    check_divisible("input", channels, "groups", 1)
    sizes = (None if n is None else n - f + 1 for n, f in zip(padded, (rows, columns), strict=True))
    check_shape("filters", filters, (batch, *sizes, rows, columns), axes)
    array = namespace(input)
    batch, height, width, *_ = array.shape(filters)
    kernel = array.reshape(filters, (batch, height, width, rows * columns))
    kernel = array.expand_dims(array.moveaxis(kernel, -1, 1), 2)
    return ops.involution(
        input, kernel, (rows, columns), padding="valid", data_format="channels_first"
    )


def propagate(x: Any, weights: Any, kernel_size: int = 3) -> Any:
    """A step of learned propagation, as in CSPN: each position sends its value to its window.

        y[n, c, p] = sum over offsets k of the window of
            weights[n, g(c), k, p - k] * x[n, c, p - k]

    The kernels belong to the source of a value, not to its target: it is
    ``involution.ops.transposed_involution`` with contiguous groups, g(c) = c // (C / G).
    Differences from CSPN's code: the weights are used as they are, without normalization, the
    center is a tap as any other, and the taps are in row-major order.

    Args:
        x: Tensor (N, C, H, W): float64, float32, bfloat16 or float16.
        weights: Tensor (N, K * K, H, W), or (N, G, K * K, H, W) for G groups of channels, of the
            dtype of ``x``. Tap (a, b) sends to the offset (a - K // 2, b - K // 2).
        kernel_size: Odd integer K.

    Returns:
        Tensor (N, C, H, W), of the dtype of ``x``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import propagate
    >>> depth, weights = np.ones((1, 1, 1, 3), "float32"), np.zeros((1, 9, 1, 3), "float32")
    >>> weights[0, 5, 0, 0] = 2  # the first position sends to the right
    >>> [float(v) for v in propagate(depth, weights)[0, 0, 0]]
    [0.0, 2.0, 0.0]

    Source: Cheng et al., "Depth Estimation via Affinity Learned with Convolutional Spatial
    Propagation Network", ECCV 2018, arXiv:1808.00150.
    """
    x, weights = operands(x=x, weights=weights)
    size = integer("kernel_size", kernel_size)
    if size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd. Received: kernel_size={kernel_size}")
    batch, channels, *sizes = shape_of("x", x, "N, C, H, W")
    has_groups = len(static_shape("weights", weights)) == 5
    groups = static_shape("weights", weights)[1] if has_groups else 1
    axes = "N, G, K * K, H, W" if has_groups else "N, K * K, H, W"
    middle = (groups, size**2) if has_groups else (size**2,)
    check_shape("weights", weights, (batch, *middle, *sizes), axes)
    check_divisible("x", channels, "G", groups)
    return by_groups(ops.transposed_involution, x, weights, groups, size, padding="symmetric")
